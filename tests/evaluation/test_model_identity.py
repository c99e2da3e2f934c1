"""Answers that were kept are another model's as soon as its content may be another, wherever it lies."""

from __future__ import annotations

import os
import shutil

from tests.lib.pinned_inputs import flip, restored
from tests.lib.small_hub import small_hub
from tulu_mega.evaluation.samples import model_identity


def test_a_model_whose_files_may_be_others_is_another(tiny, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(tiny, model)
    seen = [model_identity(str(model))]
    assert seen[0] == model_identity(str(model))
    os.rename(model, tmp_path / "moved")
    assert model_identity(str(tmp_path / "moved")) == seen[0], "the same files"
    os.rename(tmp_path / "moved", model)
    for change in (restored, flip):
        change(model / "model.safetensors")
        seen.append(model_identity(str(model)))
    (model / "vocab.txt").write_text("a")
    seen.append(model_identity(str(model)))
    assert len(set(seen)) == 4


def test_a_branch_of_the_hub_that_moved_is_another_model(tiny, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(tiny, model)
    with small_hub(tmp_path / "cache") as hub:
        first = hub.put("own/tiny", model)
        assert model_identity("own/tiny") == f"own/tiny@{first}"
        flip(model / "model.safetensors")
        second = hub.put("own/tiny", model)
        assert model_identity("own/tiny") == f"own/tiny@{second}" and second != first
