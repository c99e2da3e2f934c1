"""Weights that become NaN, and runs that learn nothing: no model is exported, and the last sound checkpoint stays."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from tests.lib import jobs, world
from tulu_mega.config import SftSettings
from tulu_mega.errors import UserError
from tulu_mega.launch.launcher import World
from tulu_mega.preflight import check

pytestmark = pytest.mark.ranks

STEPS = 6


def settings(tiny: Path, directory: Path, run_dir: str) -> SftSettings:
    rows = [{"input_ids": one.input_ids, "labels": one.labels} for one in jobs.sequences(400)]
    (directory / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = {
        "run_dir": str(directory / run_dir),
        "model": {"path": str(tiny), "dtype": "bf16"},
        "data": {"train": str(directory / "train.jsonl"), "max_length": 64, "workers": 1},
        "train": {"steps": STEPS, "global_batch": 4, "max_skipped": 3},
        "optim": {"lr": 1e-3, "schedule": "constant", "warmup": 0.0},
        "checkpoint": {"every": 1, "keep": 1},
    }
    return SftSettings.model_validate(values)


def runs(wanted: list[SftSettings], breaks: list[int | None]) -> list[str]:
    """What each run ends with; its weights become NaN in a step (from 1), or never."""
    from tulu_mega.distributed import topology
    from tulu_mega.recipes.sft import run
    from tulu_mega.train.engine import Engine

    whole, found = Engine.optimizer_step, []
    for settings, at in zip(wanted, breaks, strict=True):

        def breaking(engine, step, *arguments, at=at):
            update = whole(engine, step, *arguments)
            if step + 1 == at:
                for held in (*engine.chunks[0].parameters(), *engine.optimizer_parameters()):
                    held.data.view(-1)[0] = math.inf
            return update

        Engine.optimizer_step = breaking
        try:
            run(settings, World(0, 1, 0, 1, 1))
            found.append("done")
        except UserError as error:
            found.append(str(error))
            topology.stop()
    return found


def test_broken_weights_are_neither_exported_nor_gone_on_from(tmp_path, tiny):
    late, early, again = (settings(tiny, tmp_path, name) for name in ("late", "early", "early"))
    for each in (late, early):
        check.ready(each)
    at_the_end, on_the_way, mended = world.run(1, runs, [late, early, again], [STEPS, 3, None])[0]
    assert "the trained weights have NaN or infinity in them, and no model is exported" in at_the_end
    assert not (tmp_path / "late/hf").exists()
    assert "not finite in 3 steps in a row" in on_the_way
    assert mended == "done" and (tmp_path / "early/hf/model.safetensors").is_file()
    losses = [float(json.loads(line)["loss"]) for line in (tmp_path / "early/metrics.jsonl").read_text().splitlines()]
    assert len(losses) == STEPS and all(map(math.isfinite, losses)), "it went on from before the step that broke them"
    kept = sorted(file.name for file in (tmp_path / "late/checkpoints").iterdir())
    assert kept == [f"step_{STEPS - 1:08d}", f"step_{STEPS:08d}"], "beside the newest, the newest that is sound"
