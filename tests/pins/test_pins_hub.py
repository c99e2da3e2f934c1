"""Models that hub names mean are pinned by their content: a branch may move, the run goes on with what it began with."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.lib.pinned_inputs import edit, flip
from tests.lib.small_hub import small_hub
from tulu_mega.errors import UserError
from tulu_mega.pins import directories
from tulu_mega.pins.compare import Pinning
from tulu_mega.pins.directories import Directory
from tulu_mega.pins.record import Pin, Pins
from tulu_mega.preflight import pinned
from tulu_mega.preflight.findings import Findings


def start(run: Path, given: str = "own/tiny") -> Pin:
    """What a start of a run pins of its model."""
    pins = Pins.read(run) or Pins()
    pinned.directory(Findings(pins=Pinning(run, pins)), "model.path", Directory(given))
    pins.write(run)
    return pins.pins["model.path"]


def refusal(run: Path) -> str:
    with pytest.raises(UserError) as caught:
        start(run)
    return caught.value.problems[0]


def test_a_moved_branch_is_refused_where_the_content_is_another(tiny, tmp_path):
    model, later, run = tmp_path / "model", tmp_path / "later", tmp_path / "run"
    shutil.copytree(tiny, model)
    (model / "vocab.txt").write_text("a file that a tokenizer may have\n")
    (model / "tokenization_own.py").write_text("raise SystemExit  # which nobody runs\n")
    with small_hub(tmp_path / "cache") as hub:
        first = hub.put("own/tiny", model)
        began = start(run)
        assert began.revision == first and {"model.safetensors", "vocab.txt"} <= began.parts.keys()
        trusted = directories.pin(Directory("own/tiny", code=True), None)
        assert "tokenization_own.py" in trusted.parts, "code that may be run is there before anybody loads it"

        shutil.copytree(model, later)
        (later / "README.md").write_text("no part of a model")
        second = hub.put("own/tiny", later)
        assert start(run).revision == second, "the same content goes through"

        flip(later / "model.safetensors")
        third = hub.put("own/tiny", later)
        told = refusal(run)
        assert told.startswith(f"model.path = own/tiny: is not what run_dir = {run} began with: model.safetensors")
        assert f"the hub's revision was {second}, is {third}" in told and f"--revision {second}`" in told
        edit(later / "chat_template.jinja", "role", "Role")
        hub.put("own/tiny", later)
        assert "chat_template.jinja" in refusal(run)

        hub.put("own/tiny", model)
        assert start(run).revision == first, "put back"
        shutil.copytree(tmp_path / "cache/models--own--tiny/snapshots" / first, tmp_path / "kept")
        hub.put("own/tiny", later)
        assert start(run, str(tmp_path / "kept")).given == str(tmp_path / "kept"), "the directory of before does too"
