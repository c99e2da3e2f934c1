"""What is run of each stage: settings, material and layouts; which figures of a step are kept."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.invariant import commands, material

HERE = Path(__file__).parent
STEPS = 5
HIDDEN = 128
"""Width of the model that grpo trains; one server may serve all runs of grpo whose models are of this width."""
RELATIVE = 1e-5
"""What a figure may be off by, of its size: rounding alone, in float32, of another order of sums."""
_SHARED = {
    "model": {"path": "model", "dtype": "fp32"},
    "checkpoint": {"export": False},
}
_VERIFIER = '''
def judge(response, ground_truth, messages=None):
    """Something that a model of random weights does more or less of."""
    return sum(letter in "aeiou" for letter in response) / max(len(response), 1)
'''


@dataclass(frozen=True)
class Stage:
    """A command, what it is run with, and what is kept of each step."""

    name: str
    settings: Mapping[str, Mapping[str, Any]]
    layouts: Mapping[str, tuple[int, tuple[str, ...]]]
    """By name: number of ranks, and flags. The first is the reference."""
    figures: tuple[str, ...]
    """fields of metrics.jsonl"""
    absolute: float = 0.0
    """What a figure may be off by whatever its size, where it is a difference of larger ones."""

    @property
    def file(self) -> Path:
        """The committed figures."""
        return HERE / f"{self.name}.json"

    def prepare(self, directory: Path) -> None:
        """Writes model, rows and settings."""
        material.make_model(directory / "model", hidden=HIDDEN if self.name == "grpo" else 32)
        rows = {"sft": material.conversations, "dpo": material.pairs, "grpo": lambda count: material.prompts(count, "vowels")}
        material.write_rows(directory / "train.jsonl", rows[self.name](32))
        (directory / "own_verifier.py").write_text(_VERIFIER)
        commands.settings_file(directory / "settings.toml", _SHARED | self.settings)

    def trajectory(self, directory: Path, layout: str, *flags: str, **variables: str) -> dict[str, list[float]]:
        """Each figure of every step, from a run under a layout.

        Args:
            directory: prepared.
            flags: further ones.
            variables: environment variables of the ranks.
        """
        size, parallel = self.layouts[layout]
        run_dir = layout.replace(" ", "_")
        commands.run(directory, size, self.name, "settings.toml", "--run_dir", run_dir, *parallel, *flags, **variables)
        steps = commands.steps(directory / run_dir)
        return {name: [step[name] for step in steps] for name in self.figures}

    def expect(self, found: Mapping[str, list[float]], expected: Mapping[str, list[float]]) -> None:
        """
        Raises:
            AssertionError: a figure is further off than rounding, with all steps of all figures that are.
        """
        assert found.keys() == expected.keys()
        off = {
            name: {"found": found[name], "expected": expected[name]}
            for name in expected
            if len(found[name]) != len(expected[name])
            or not all(
                math.isclose(one, other, rel_tol=RELATIVE, abs_tol=self.absolute)
                for one, other in zip(found[name], expected[name], strict=True)
            )
        }
        assert not off, f"{self.name} trains otherwise than {self.file.name} says (see write.py): {off}"


SFT = Stage(
    "sft",
    {
        "data": {"train": "train.jsonl", "max_length": 256, "pack_length": 384},
        "train": {"steps": STEPS, "global_batch": 8},
        "optim": {"lr": 3e-3, "warmup": 0.0},
    },
    {"one rank": (1, ()), "tensor 2": (2, ("--parallel.tensor", "2"))},
    ("loss", "grad_norm"),
)
DPO = Stage(
    "dpo",
    {
        "data": {"train": "train.jsonl", "max_length": 128, "pack_length": 384},
        "train": {"steps": STEPS, "global_batch": 8},
        "optim": {"lr": 3e-3, "warmup": 0.0},
    },
    {"one rank": (1, ()), "context 2": (2, ("--parallel.context", "2"))},
    ("loss", "grad_norm", "margin"),
    absolute=1e-6,
)
GRPO = Stage(
    "grpo",
    {
        "data": {"train": "train.jsonl", "max_prompt": 64, "pack_length": 256},
        "sampling": {"samples": 4, "max_tokens": 16},
        "policy": {"beta": 0.05, "overlong": "keep"},
        "rewards": {"scale": 1.0, "workers": 1},
        "rewards.custom": {"vowels": "own_verifier:judge"},
        "train": {"steps": STEPS, "prompts": 4, "mini_batches": 2},
        "optim": {"lr": 1e-3},
    },
    {"one rank": (1, ()), "pipeline 2": (2, ("--parallel.pipeline", "2"))},
    ("loss", "grad_norm", "reward", "kl", "response_length"),
    absolute=1e-6,
)
STAGES = (SFT, DPO, GRPO)
