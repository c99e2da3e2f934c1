"""Pins through the command line."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.lib.pinned_inputs import CHANGES, WEIGHTS, Change, Inputs, drop_line, flip
from tulu_mega.config import GrpoSettings, SftSettings, load
from tulu_mega.launch.run_dir import CONFIG
from tulu_mega.preflight.check import ready

ROOT = Path(__file__).parents[2]


@pytest.fixture
def inputs(tiny, tmp_path):
    return Inputs.make(tmp_path, tiny)


def tulu_mega(inputs: Inputs, *arguments: str) -> tuple[int, str]:
    """Status and standard error of a command."""
    paths = os.pathsep.join([str(ROOT), str(inputs.root), os.environ.get("PYTHONPATH", "")])
    command, env = [sys.executable, "-m", "tulu_mega", *arguments], os.environ | {"PYTHONPATH": paths}
    done = subprocess.run(command, env=env, cwd=inputs.root, capture_output=True, text=True, timeout=280)
    return done.returncode, done.stderr


def began(inputs: Inputs, kind, stage: str) -> None:
    """A run that has made its start, but no step."""
    asked = load(kind, None, inputs.flags(stage))
    ready(asked)
    (inputs.root / "run" / CONFIG).write_text(asked.model_dump_json())


def test_a_command_names_all_that_has_changed(inputs):
    began(inputs, SftSettings, "sft")
    flip(inputs.root / WEIGHTS)
    drop_line(inputs.root / "heldout.jsonl")
    status, told = tulu_mega(inputs, "sft", *inputs.flags("sft"))
    assert status == 2
    assert "error: model.path = " in told and "error: heldout.data = " in told and "--accept_changes model.path" in told


@pytest.mark.acceptance
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.name)
def test_every_change(inputs, change: Change, monkeypatch):
    """A run of two steps; another content; accepted, with two steps more. (`grpo` without its servers: the start and `check`.)"""
    monkeypatch.syspath_prepend(str(inputs.root))
    base = [change.stage, *inputs.flags(change.stage)]
    steps, more = (["--train.steps", "2"], ["--train.steps", "4"]) if change.stage != "grpo" else ([], [])
    if change.stage == "grpo":
        began(inputs, GrpoSettings, "grpo")
    else:
        assert tulu_mega(inputs, *base, *steps)[0] == 0
    change.make(inputs.root)
    again = [*base, *(flag.replace("ROOT", str(inputs.root)) for flag in change.flags), *more]
    status, told = tulu_mega(inputs, *again)
    assert status == 2 and f"error: {change.setting} = " in told and change.told in told
    accept = ["--accept_changes", change.setting]
    status, told = tulu_mega(inputs, *(["check"] if change.stage == "grpo" else []), *again, *accept)
    assert status == 0, told
