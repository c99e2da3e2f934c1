"""A run that an old commit began (see old_run/make_old_run.py) goes on by the same command, and ends as it would have there.

Two ranks began it and one goes on with it, so the rest is equal up to rounding: losses and gradient norms to 1e-5 of their size,
weights to 1e-5. The steps that were done are taken as they are, and the data is tokenised as it was.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.invariant import commands

FILES = Path(__file__).parent / "old_run/files"
DONE = 3


def test_an_old_run_goes_on(tmp_path):
    place = shutil.copytree(FILES, tmp_path / "old")
    run = place / "run"
    before = (run / "metrics.jsonl").read_text()
    tokens = {name: np.load(run / f"data/{name}.npy") for name in ("tokens", "labels", "offsets")}
    commands.run(place, 1, "sft", "settings.toml", "--run_dir", "run")

    assert (run / "metrics.jsonl").read_text().startswith(before)  # times as well: they were not done again
    for name, kept in tokens.items():  # made anew, for the store is of another version
        np.testing.assert_array_equal(np.load(run / f"data/{name}.npy"), kept, err_msg=name)
    found, expected = commands.steps(run), commands.steps(place / "undisturbed")
    assert [step["step"] for step in found] == [step["step"] for step in expected]
    for name in ("loss", "grad_norm", "lr", "tokens", "sequences"):
        assert [step[name] for step in found[DONE:]] == pytest.approx([step[name] for step in expected[DONE:]], rel=1e-5), name
    last = found[-1]  # what its save took stands in its line, as soon as that is known
    assert 0 < last["save_waited_seconds"] <= last["save_seconds"] and last["save_memory_gib"] >= 0
    weights, wanted, first = (
        load_file(directory / "model.safetensors") for directory in (run / "hf", place / "undisturbed", place / "model")
    )
    assert weights.keys() == wanted.keys()
    for name in wanted:
        np.testing.assert_allclose(weights[name], wanted[name], rtol=0, atol=1e-5, err_msg=name)
        assert not np.allclose(wanted[name], first[name], rtol=0, atol=1e-3), name
