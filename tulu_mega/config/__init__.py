"""Settings: pydantic, strict, frozen, importable without torch.

A class is imported when a program asks for it: to name the commands, the command line reads `config.stages` alone, which takes
less time than the import of pydantic.
"""

import importlib
from typing import Any

_DEFINED = {
    "inference": ("GenerateSettings", "ScoreSettings"),
    "data": ("DataInspectSettings", "DataMixSettings", "DecontaminateSettings"),
    "dpo": ("DpoSettings",),
    "grpo": ("GrpoSettings",),
    "policy_run": (
        "PolicyRunSettings",
        "PolicyTrainSettings",
        "PromptDataSettings",
        "PromptHeldOutSettings",
        "RewardSettings",
    ),
    "ppo": ("PpoSettings",),
    "precision": ("PrecisionSettings",),
    "preference": ("PreferenceSettings",),
    "rm": ("RmSettings",),
    "rollout": ("PolicyLossSettings", "PolicySettings", "RolloutSettings", "SamplingSettings", "ServeSettings"),
    "run": ("EngineSettings", "PreferenceStageSettings", "RunSettings", "StageSettings"),
    "sections": (
        "CheckpointSettings",
        "DataSettings",
        "FormName",
        "HeldOutSettings",
        "ModelSettings",
        "OptimSettings",
        "ParallelSettings",
        "PreferenceDataSettings",
        "ProfileSettings",
        "ReferenceSettings",
        "Section",
        "SpikeSettings",
        "StragglerSettings",
        "TrainSettings",
        "WandbSettings",
        "WatchdogSettings",
    ),
    "sft": ("SftSettings",),
    "source": ("describe", "load"),
}
"""What each module of this package offers under the package's own name."""
_MODULES = {name: module for module, names in _DEFINED.items() for name in names}
__all__ = sorted(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    return value
