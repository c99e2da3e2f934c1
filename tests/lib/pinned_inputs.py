"""A run's inputs on disk, and ways to change them between two starts."""

from __future__ import annotations

import itertools
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tulu_mega.quickstart import task

WEIGHTS, REWARD = "model/model.safetensors", "reward/model.safetensors"
VERIFIER = "import {helper}\ndef judge(response, ground_truth, *, messages=None):\n    return float({helper}.same(response))\n"


@dataclass(frozen=True)
class Inputs:
    """Of runs of every stage."""

    root: Path

    @classmethod
    def make(cls, root: Path, model: Path) -> Inputs:
        """Lays them out.

        Args:
            model: a language model, which is copied.
        """
        shutil.copytree(model, root / "model")
        (root / "model/chat_template.jinja").write_text(
            "{% for m in messages %}{{ m.role }}: {% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
            "{{ eos_token }}{% endgeneration %}{% else %}{{ m.content }}\n{% endif %}{% endfor %}"
        )
        _reward_model(root / "model", root / "reward")
        rows = list(itertools.islice(task.demonstrations(seed=0), 24))
        _write(root / "rows.jsonl", rows[:16])
        _write(root / "heldout.jsonl", rows[16:])
        talks = [row["messages"] for row in rows]
        pairs = [{"chosen": talk, "rejected": [*talk[:-1], {**talk[-1], "content": "no"}]} for talk in talks]
        _write(root / "pairs.jsonl", pairs)
        prompts = [{"messages": row["messages"][:-1], "ground_truth": "1", "dataset": "mine"} for row in rows[:4]]
        prompts.append({**prompts[0], "ground_truth": "4", "dataset": "math"})
        _write(root / "prompts.jsonl", prompts)
        (root / "pinned_verifier.py").write_text(VERIFIER.format(helper="pinned_helper"))
        (root / "pinned_helper.py").write_text("def same(text):\n    return text == '1'\n")
        return cls(root)

    def flags(self, stage: str, run: str = "run") -> list[str]:
        """The command line of a stage's run."""
        values = {
            "run_dir": self.root / run,
            "model.path": self.root / "model",
            "model.dtype": "fp32",
            "optim.schedule": "constant",
            "optim.warmup": "0.0",
        }
        if stage in ("grpo", "ppo"):
            values |= {
                "data.train": self.root / "prompts.jsonl",
                "data.max_prompt": 128,
                "sampling.max_tokens": 16,
                {"grpo": "rewards.model", "ppo": "value.path"}[stage]: self.root / "reward",
                "rewards.custom": '{mine = "pinned_verifier:judge"}',
            }
        else:
            rows = self.root / ("pairs.jsonl" if stage == "dpo" else "rows.jsonl")
            values |= {"data.train": f'{{"{rows}" = 0.5}}', "train.global_batch": 4, "data.max_length": 256}
        if stage == "sft":
            values |= {"heldout.data": self.root / "heldout.jsonl", "data.template": "tokenizer"}
        return [text for name, value in values.items() for text in (f"--{name}", str(value))]


def _reward_model(model: Path, directory: Path) -> None:
    shutil.copytree(model, directory)
    tensors = load_file(model / "model.safetensors")
    tensors["score.weight"] = torch.zeros(1, tensors["model.norm.weight"].shape[0])
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    config = json.loads((model / "config.json").read_text())
    config |= {"architectures": ["LlamaForSequenceClassification"], "id2label": {"0": "LABEL_0"}, "tie_word_embeddings": False}
    (directory / "config.json").write_text(json.dumps(config))


def _write(file: Path, rows: list[dict]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def flip(file: Path) -> None:
    """Other bytes, the size stays."""
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)


def restored(file: Path) -> None:
    """Other bytes under the times of before."""
    times = os.stat(file)
    flip(file)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))


def swap(directory: Path) -> None:
    """A link to other weights where the directory was."""
    other = directory.with_name("other")
    shutil.copytree(directory, other)
    flip(other / "model.safetensors")
    directory.rename(directory.with_name("before"))
    directory.symlink_to(other)


def edit(file: Path, old: str, new: str) -> None:
    content = file.read_text()
    assert old in content
    file.write_text(content.replace(old, new))


def drop_line(file: Path) -> None:
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:-1]))


@dataclass(frozen=True)
class Change:
    """A way to change an input."""

    name: str
    stage: str
    setting: str
    """refused under this name"""
    told: str
    """of the message"""
    make: Callable[[Path], None]
    """of the root of `Inputs`"""
    flags: tuple[str, ...] = ()
    """of the second start; ROOT stands for the root"""


LESS = '{"ROOT/rows.jsonl" = 0.25}'
CHANGES = [
    Change("weights", "sft", "model.path", "model.safetensors", lambda root: flip(root / WEIGHTS)),
    Change("link", "sft", "model.path", "model.safetensors", lambda root: swap(root / "model")),
    Change(
        "tokenizer",
        "sft",
        "model.path",
        "tokenizer.json",
        lambda root: edit(root / "model/tokenizer.json", '"version"', ' "version"'),
    ),
    Change(
        "template",
        "sft",
        "model.path",
        "chat_template.jinja",
        lambda root: edit(root / "model/chat_template.jinja", "m.role }}: ", "m.role }}> "),
    ),
    Change("rows", "sft", "data.train", "of 15 rows", lambda root: drop_line(root / "rows.jsonl")),
    Change("mixture", "sft", "data.train", "0.25: 4 of 16 rows", lambda root: None, ("--data.train", LESS)),
    Change("reward model", "grpo", "rewards.model", "model.safetensors", lambda root: flip(root / REWARD)),
    Change("value model", "ppo", "value.path", "model.safetensors", lambda root: flip(root / REWARD)),
    Change(
        "another value model",
        "ppo",
        "value.path",
        "model.safetensors",
        lambda root: flip(Path(shutil.copytree(root / "reward", root / "other")) / "model.safetensors"),
        ("--value.path", "ROOT/other"),
    ),
    Change("reference", "dpo", "model.path", "model.safetensors", lambda root: flip(root / WEIGHTS)),
    Change(
        "verifier",
        "grpo",
        "rewards.custom",
        "pinned_verifier.py",
        lambda root: edit(root / "pinned_verifier.py", "float", "bool"),
    ),
    Change(
        "what a verifier imports",
        "grpo",
        "rewards.custom",
        "pinned_helper.py",
        lambda root: edit(root / "pinned_helper.py", "'1'", "'2'"),
    ),
    Change("prompts", "grpo", "data.train", "(4 rows)", lambda root: drop_line(root / "prompts.jsonl")),
    Change("held-out rows", "sft", "heldout.data", "(7 rows)", lambda root: drop_line(root / "heldout.jsonl")),
    Change("times restored", "sft", "model.path", "model.safetensors", lambda root: restored(root / WEIGHTS)),
    Change("config.json", "sft", "model.path", "config.json", lambda root: edit(root / "model/config.json", "1e-05", "2e-05")),
]
