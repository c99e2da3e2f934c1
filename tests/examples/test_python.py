"""The scripts of examples/python: what they compute, and that they run."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import os
import re
import subprocess
import sys
from itertools import islice
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file

from tulu_mega.data.batch import pack
from tulu_mega.errors import UserError
from tulu_mega.layout.alignment import Alignment
from tulu_mega.objectives.sft import SftObjective
from tulu_mega.records import IGNORE, TokenizedRow, TokenOutput
from tulu_mega.rewards import RewardSpec, check_rows

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted((ROOT / "examples/python").glob("*.py"))


def script(name: str) -> ModuleType:
    """A script as a module of its own name, as another process would import it."""
    spec = importlib.util.spec_from_file_location(name, ROOT / f"examples/python/{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_examples_are_short():
    assert len(SCRIPTS) >= 3
    assert {file.name: len(file.read_text().splitlines()) for file in SCRIPTS if len(file.read_text().splitlines()) >= 60} == {}


def test_the_objective_is_its_formula():
    """Value and gradient beside torch's autograd on each token alone; at gamma 0 it is cross-entropy."""
    rows = [TokenizedRow(0, [1, 2, 3, 4], [IGNORE, 2, 3, 4]), TokenizedRow(1, [5, 6, 7], [IGNORE, IGNORE, 7])]
    batch = pack(rows, Alignment())
    logp_T = -torch.rand(len(batch.tokens_T), generator=torch.Generator().manual_seed(0)) * batch.loss_mask_T
    objective = script("custom_objective").FocalObjective
    given = logp_T.clone().requires_grad_()
    made = objective(2.0)(TokenOutput(given, None, batch), batch)
    made.loss_sum.backward()
    truth = logp_T.double().clone().requires_grad_()
    expected = sum(-((1 - truth[at].exp()) ** 2) * truth[at] for at in range(len(truth)) if batch.loss_mask_T[at])
    expected.backward()
    assert made.count == 4
    torch.testing.assert_close(made.loss_sum.double(), expected)
    torch.testing.assert_close(given.grad.double()[batch.loss_mask_T], truth.grad[batch.loss_mask_T])
    plain = objective(0.0)(TokenOutput(logp_T, None, batch), batch)
    torch.testing.assert_close(plain.loss_sum, SftObjective("token_mean")(TokenOutput(logp_T, None, batch), batch).loss_sum)


def loop(model: str, output: str) -> str:
    """What rank 0 of the custom loop prints."""
    from tulu_mega.launch.launcher import World

    module = script("custom_loop")
    values = {"model": {"path": model, "dtype": "fp32"}, "output": output, "steps": 4}
    size = int(os.environ["WORLD_SIZE"])
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        module.run(module.LoopSettings.model_validate(values), World(0, size, 0, size, size))
    return printed.getvalue()


@pytest.mark.ranks
def test_the_loop_trains_and_exports(tiny, tmp_path):
    from tests.lib import world

    (printed,) = world.run(1, loop, str(tiny), str(tmp_path / "trained"))
    losses = [float(found) for found in re.findall(r"loss ([\d.]+)", printed)]
    assert len(losses) == 4 and losses[-1] < losses[0] - 0.5
    trained, before = load_file(tmp_path / "trained/model.safetensors"), load_file(tiny / "model.safetensors")
    assert trained.keys() == before.keys()
    assert any(not torch.equal(trained[name], before[name]) for name in trained)


def test_the_verifier_scores_and_refuses(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples/python"))
    brief = script("custom_verifier").brief
    assert brief("It is 4.", "4", messages=[]) == 1.0
    assert brief("It is 5.", "4", messages=[]) == brief("", "4", messages=[]) == 0.0
    assert brief("well " * 25 + "4", "4", messages=[]) == pytest.approx(0.8)
    assert brief("well " * 500 + "4", "4", messages=[]) == 0.1
    spec = RewardSpec(custom={"brief": "custom_verifier:brief"}, aliases={"gsm8k": "brief"})
    rows = [{"messages": [], "dataset": "gsm8k", "ground_truth": "4"}]
    assert check_rows(rows, spec) == ["brief"]
    with pytest.raises(UserError, match="expected a whole number, got 'four'"):
        check_rows([{**rows[0], "ground_truth": "four"}], spec)


def ran(name: str, *arguments: object, cwd: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / f"examples/python/{name}.py"), *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=600)


@pytest.mark.acceptance
def test_scripts_start_their_ranks(tiny, tmp_path):
    """As users start them, two ranks each; layouts give the same losses; what can be mended is told in lines."""
    told = []
    for layout in ("--parallel.tensor", "--parallel.data"):
        made = ran(
            "custom_loop", "--model.path", tiny, "--model.dtype", "fp32", "--output", tmp_path / layout, layout, 2, cwd=tmp_path
        )
        assert made.returncode == 0, made.stderr
        told.append(re.findall(r"loss ([\d.]+)", made.stdout))
    assert told[0] == told[1] and len(told[0]) == 20 and float(told[0][-1]) < 0.5
    wrong = ran("custom_loop", "--modle.path", tiny, cwd=tmp_path)
    assert wrong.returncode == 2 and "error: modle: unknown setting; did you mean 'model'?" in wrong.stderr
    assert "--steps  int, default 20" in ran("custom_loop", "--help", cwd=tmp_path).stdout


@pytest.mark.acceptance
def test_the_objective_trains_as_a_stage(tiny, tmp_path):
    """Data is checked and tokenised, metrics and export are there, and a second start goes on."""
    from tulu_mega.quickstart import task

    rows = islice(task.demonstrations(seed=0), 48)
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = [
        *("--run_dir", "run", "--model.path", tiny, "--model.dtype", "fp32", "--data.train", "train.jsonl", "--parallel.data", 2),
        *("--train.global_batch", 8, "--optim.lr", 3e-3, "--optim.schedule", "constant", "--optim.warmup", 0),
    ]
    for steps in (4, 8):
        made = ran("custom_objective", *arguments, "--train.steps", steps, cwd=tmp_path)
        assert made.returncode == 0, made.stderr
    metrics = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in metrics] == list(range(1, 9))
    assert all(row["loss"] < row["nll"] for row in metrics) and metrics[-1]["nll"] < metrics[0]["nll"]
    assert (tmp_path / "run/hf/model.safetensors").exists()
    refused = ran("custom_objective", *arguments, "--data.train", "none.jsonl", cwd=tmp_path)
    assert refused.returncode == 2 and "none.jsonl" in refused.stderr and "Traceback" not in refused.stderr
