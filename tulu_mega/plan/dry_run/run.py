"""The dry run: a process that builds the ranks, and what their reports come to."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from tulu_mega.bridge.families import family_for
from tulu_mega.config import EngineSettings, ParallelSettings
from tulu_mega.config.lora import LoraSettings
from tulu_mega.config.stages import stage_of
from tulu_mega.distributed.grid import ShardGrid
from tulu_mega.errors import UserError
from tulu_mega.launch.launcher import resolve
from tulu_mega.plan.dry_run import check
from tulu_mega.plan.dry_run.record import DryRun, RankReport


def dry_run(
    settings: EngineSettings, config: Mapping[str, Any], world: int, value_config: Mapping[str, Any] | None = None
) -> DryRun:
    """Builds every distinct rank of a world by megatron-core, without memory, and checks them against the whole model.

    What a rank holds follows from its pipeline and tensor rank; the DP x CP ranks that share these are copies of one another.
    The first copy is built whole, and of the last one a rank of each stage to see that it is one. Optimizer shards, of which
    every copy has its own, are taken from the buffers for all of them.

    Layers are those of the local specification whatever `model.spec` says: Transformer Engine's hold the same weights
    under other names.

    Args:
        settings: of `sft`, `rm`, `dpo`, `grpo`, `ppo` (the trainer's ranks) or `score`.
        config: the model's config.json; its weights are not read.
        world: ranks of the trainer.
        value_config: config.json of the value model that trains beside, where one does.

    Returns:
        what was found, `problems` among it.

    Raises:
        UserError: the layout does not fit the world or the model, or megatron-core refuses it.
    """
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="tulu_mega_dry_run_") as scratch:
        ask(Path(scratch), settings, config, world, value_config)
        hidden = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        program = [sys.executable, "-W", "ignore", "-m", "tulu_mega.plan.dry_run", scratch]
        ended = subprocess.run(program, env=os.environ | hidden, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        if ended.returncode:
            raise RuntimeError(f"the dry run's process ended with status {ended.returncode}:\n{ended.stderr[-4000:]}")
        return answer(Path(scratch), settings, began)


def ask(
    directory: Path,
    settings: EngineSettings,
    config: Mapping[str, Any],
    world: int,
    value_config: Mapping[str, Any] | None = None,
) -> None:
    """Writes what the process reads. Arguments as for :func:`dry_run`."""
    kind = type(settings)
    job = {"kind": f"{kind.__module__}:{kind.__qualname__}", "settings": settings.model_dump(mode="json"), "world": world}
    (directory / "job.json").write_text(json.dumps(job))
    (directory / "config.json").write_text(json.dumps(dict(config)))
    if value_config is not None:
        (directory / "value").mkdir()
        (directory / "value" / "config.json").write_text(json.dumps(dict(value_config)))


def answer(directory: Path, settings: EngineSettings, began: float) -> DryRun:
    """Makes a record of what the process wrote, and checks it.

    Args:
        began: on the monotonic clock, for the record.

    Raises:
        UserError: the ranks could not be built.
    """
    told = json.loads((directory / "result.json").read_text())
    if wrong := told.get("problems"):
        raise UserError(wrong)
    made = _record(told, settings.parallel, began, told["peak_bytes"])
    if "value" not in told:
        return made
    value = _record(told["value"], resolve(stage_of(settings).workload)(settings).value.parallel, began, told["peak_bytes"])
    return replace(made, value=value, problems=(*made.problems, *(f"value model: {each}" for each in value.problems)))


def _record(told: Mapping[str, Any], parallel: ParallelSettings, began: float, peak: int) -> DryRun:
    """One model's.

    Args:
        parallel: its layout, for the planner.
        peak: bytes of the process's memory.
    """
    layout = ShardGrid(**told["layout"])
    first = tuple(RankReport.read(each) for each in told["first"])
    last = tuple(RankReport.read(each) for each in told["last"])
    shapes = {name: tuple(shape) for name, shape in told["hf_shapes"].items()}
    config = told["config"]
    lora = told["lora"] and LoraSettings.model_validate(told["lora"])
    found = check.problems(layout, first, last, family_for(config), config, shapes, parallel, lora)
    return DryRun(
        layout=layout,
        ranks=first,
        replicas=len(last),
        hf_tensors=len(shapes),
        hf_parameters=sum(map(math.prod, shapes.values())),
        problems=tuple(found),
        seconds=time.monotonic() - began,
        peak_bytes=peak,
    )
