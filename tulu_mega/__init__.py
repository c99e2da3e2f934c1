"""tulu_mega: the Tulu 3 post-training recipe on Megatron-core models with vLLM rollouts.

`PUBLIC` names what programs may import: ``from tulu_mega import Engine, run_script``. docs/reference/python_api.md explains it.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

PUBLIC = {
    "main": "tulu_mega.cli:main",
    "run_script": "tulu_mega.cli:run_script",
    "prepare_imports": "tulu_mega.platforms:prepare_imports",
    "load": "tulu_mega.config.source:load",
    "EngineSettings": "tulu_mega.config.run:EngineSettings",
    "StageSettings": "tulu_mega.config.run:StageSettings",
    "SftSettings": "tulu_mega.config.sft:SftSettings",
    "RmSettings": "tulu_mega.config.rm:RmSettings",
    "DpoSettings": "tulu_mega.config.dpo:DpoSettings",
    "GrpoSettings": "tulu_mega.config.grpo:GrpoSettings",
    "PpoSettings": "tulu_mega.config.ppo:PpoSettings",
    "OptimSettings": "tulu_mega.config.sections:OptimSettings",
    "UserError": "tulu_mega.errors:UserError",
    "Stopped": "tulu_mega.errors:Stopped",
    "World": "tulu_mega.launch.launcher:World",
    "opened": "tulu_mega.train.session:opened",
    "Session": "tulu_mega.train.session:Session",
    "Engine": "tulu_mega.train.engine:Engine",
    "Objective": "tulu_mega.train.engine:Objective",
    "Update": "tulu_mega.train.engine:Update",
    "ReducedLoss": "tulu_mega.train.batch_loss:ReducedLoss",
    "BatchLoss": "tulu_mega.train.batch_loss:BatchLoss",
    "packed_share": "tulu_mega.train.scoring:packed_share",
    "opened_run": "tulu_mega.train.dataset_run:opened_run",
    "DatasetRun": "tulu_mega.train.dataset_run:DatasetRun",
    "SftObjective": "tulu_mega.objectives.sft:SftObjective",
    "TokenizedRow": "tulu_mega.records:TokenizedRow",
    "PackedBatch": "tulu_mega.records:PackedBatch",
    "TokenOutput": "tulu_mega.records:TokenOutput",
    "LossOutput": "tulu_mega.records:LossOutput",
    "Reads": "tulu_mega.records:Reads",
    "IGNORE": "tulu_mega.records:IGNORE",
    "Verdict": "tulu_mega.rewards.verdict:Verdict",
    "VerifierInput": "tulu_mega.rewards.verdict:VerifierInput",
    "VerifierPool": "tulu_mega.rewards.pool:VerifierPool",
    "RewardSpec": "tulu_mega.rewards.registry:RewardSpec",
    "CodeLimits": "tulu_mega.rewards.sandbox:CodeLimits",
    "check_rows": "tulu_mega.rewards.registry:check_rows",
}
"""The public names, each with the ``module:attribute`` that defines it. It is imported when the name is asked for."""


def __getattr__(name: str) -> Any:
    if name not in PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; PUBLIC lists what it offers")
    module, _, attribute = PUBLIC[name].partition(":")
    value = globals()[name] = getattr(importlib.import_module(module), attribute)
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *PUBLIC])
