"""A checkpoint whose bytes are others than were written: set aside for the one before, refused where there is none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch.distributed as dist

from tests.lib import checkpoints, jobs, world
from tests.lib.pinned_inputs import flip
from tulu_mega.config import OptimSettings
from tulu_mega.errors import UserError
from tulu_mega.pins.digest import digest
from tulu_mega.train import checkpoint
from tulu_mega.train.checkpoint_files import damaged, verified_or_set_aside

pytestmark = pytest.mark.ranks


def through_damages(source: str, directory: Path) -> dict:
    told = {}
    with jobs.session(source, {"tensor": 2}) as made:
        made.engine.prepare_training(OptimSettings(lr=1e-2, schedule="constant", warmup=0.0), 10)
        for step in (1, 2, 3):
            checkpoints.save(made.engine, directory, step, {}, keep=3)
        told["whole"] = [verified_or_set_aside(each.path, None, made.engine.at) for each in checkpoint.find(directory)]
        manifest = json.loads((directory / "step_00000003/training.json").read_text())
        told["digests"] = {name: digest(directory / "step_00000003" / name) == each for name, each in manifest["digests"].items()}
        told["files"] = manifest["files"].keys() == manifest["digests"].keys()
        dist.barrier()
        if dist.get_rank() == 0:
            for step in (1, 3):
                flip(directory / f"step_0000000{step}/__1_0.distcp")
        dist.barrier()
        told["read"] = damaged(directory)
        found = checkpoint.find(directory)
        told["third"] = verified_or_set_aside(found[2].path, found[1].path.name, made.engine.at)
        told["left"] = sorted(each.name for each in directory.iterdir())
        told["second"] = verified_or_set_aside(found[1].path, found[0].path.name, made.engine.at)
        with pytest.raises(UserError) as caught:
            verified_or_set_aside(found[0].path, None, made.engine.at)
        told["first"] = caught.value.problems
    return told


def test_damages_are_found_before_anything_is_loaded(tmp_path):
    model, directory = tmp_path / "model", tmp_path / "checkpoints"
    world.run(1, jobs.make_model, str(model), False)
    for told in world.run(2, through_damages, str(model), directory, timeout=120):
        assert told["whole"] == [True, True, True] and told["files"]
        assert "__0_0.distcp" in told["digests"] and "common.pt" in told["digests"] and all(told["digests"].values())
        assert ["step_00000001" in each or "step_00000003" in each for each in told["read"]] == [True, True]
        assert (told["third"], told["second"]) == (False, True)
        assert told["left"] == ["step_00000001", "step_00000002", "step_00000003.damaged"]
        assert "__1_0.distcp: holds other bytes than were written" in told["first"][0]
        assert "is damaged, and no checkpoint is before it" in told["first"][1]
