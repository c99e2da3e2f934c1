"""``python -m tulu_mega.plan.dry_run DIRECTORY``: builds the ranks, in a process of its own.

megatron-core's global state needs one.

Reads job.json and config.json there, and of a value model beside a policy value/config.json, and writes result.json: ``problems``
to tell the user, or else what `run` makes a record of.
"""

from __future__ import annotations

import json
import resource
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from tulu_mega.config import EngineSettings
from tulu_mega.config.stages import stage_of
from tulu_mega.config.workload import Workload
from tulu_mega.errors import UserError
from tulu_mega.launch.launcher import resolve
from tulu_mega.platforms import meta

RESULT, JOB, VALUE = "result.json", "job.json", "value"


def main(directory: Path) -> None:
    """Does the job that lies in a directory."""
    job = json.loads((directory / JOB).read_text())
    settings = resolve(job["kind"]).model_validate_json(json.dumps(job["settings"]))
    platform = meta.install()  # before anything of megatron-core
    try:
        result = _build(directory, settings, job["world"], platform)
    except UserError as error:
        result = {"problems": error.problems}
    (directory / RESULT).write_text(json.dumps(result))


def _build(directory: Path, settings: EngineSettings, world: int, platform: Any) -> dict[str, Any]:
    """What was found out about the model that the stage is for, under ``value`` about the value model beside it."""
    stage = stage_of(settings)  # scoring is none
    workload = resolve(stage.workload)(settings) if stage else None
    made = _model(directory, settings, world, platform, bool(stage and stage.reward), workload)
    if workload and workload.value:
        own = settings.model_copy(update={"parallel": workload.value.parallel})
        # it is sent nowhere, compared with nothing, and trains whole
        alone = replace(workload, value=None, rollout=None, reference=False, adapters=False)
        made["value"] = _model(directory / VALUE, own, world, platform, True, alone)
    return {**made, "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}


def _model(
    directory: Path, settings: EngineSettings, world: int, platform: Any, reward: bool, workload: Workload | None
) -> dict[str, Any]:
    """What was found out about a model.

    Args:
        directory: that has its config.json.
        reward: whether it is to be a reward model.
        workload: of the stage that trains it; None where it is not trained.
    """
    from tulu_mega.bridge.families import family_for
    from tulu_mega.bridge.families.reward import reward_fields
    from tulu_mega.bridge.files.peft import resolved
    from tulu_mega.distributed.grid import ShardGrid
    from tulu_mega.model.hf_config import load_config
    from tulu_mega.plan.dry_run import rank
    from tulu_mega.plan.dry_run.truth import hf_shapes

    parallel = settings.parallel
    data = parallel.replicas(world)
    layout = ShardGrid(parallel.tensor, parallel.pipeline, parallel.virtual_pipeline, parallel.context, data)
    hf = load_config(settings.model.model_copy(update={"path": str(directory)}))
    family = family_for(hf.to_dict())
    reward = family.reward or reward
    lora = resolved(settings.lora) if workload and workload.adapters else None
    if reward:
        hf.update(reward_fields(family, hf.to_dict()))

    def built(stage: int, tensor_rank: int, copy: int) -> dict[str, Any]:
        number = layout.at(tensor_rank=tensor_rank, pipeline_rank=stage, copy=copy).rank
        with rank.place(settings, number, layout.world, platform) as here:
            return asdict(rank.report(hf, settings, here, platform, reward, workload, lora))

    first = [built(stage, tensor_rank, 0) for stage in range(layout.pipeline) for tensor_rank in range(layout.tensor)]
    last = []
    if layout.copies > 1:
        last = [built(stage, layout.tensor - 1, layout.copies - 1) for stage in range(layout.pipeline)]
    return {
        "layout": layout.sizes,
        "config": hf.to_dict(),
        "lora": lora and lora.model_dump(mode="json", exclude={"adapter"}),
        "first": first,
        "last": last,
        "hf_shapes": hf_shapes(hf, reward),
    }


if __name__ == "__main__":
    main(Path(sys.argv[1]))
