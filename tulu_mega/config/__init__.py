"""Settings: pydantic, strict, frozen, importable without torch."""

from tulu_mega.config.data import DataInspectSettings, DataMixSettings, DecontaminateSettings
from tulu_mega.config.grpo import (
    GrpoSettings,
    GrpoTrainSettings,
    PromptDataSettings,
    PromptHeldOutSettings,
    RewardSettings,
)
from tulu_mega.config.precision import PrecisionSettings
from tulu_mega.config.preference import PreferenceSettings
from tulu_mega.config.rollout import PolicySettings, RolloutSettings, SamplingSettings, ServeSettings
from tulu_mega.config.sections import (
    CheckpointSettings,
    DataSettings,
    HeldOutSettings,
    ModelSettings,
    OptimSettings,
    ParallelSettings,
    PreferenceDataSettings,
    ReferenceSettings,
    Section,
    SpikeSettings,
    StragglerSettings,
    TrainSettings,
    WandbSettings,
    WatchdogSettings,
)
from tulu_mega.config.source import describe, load
from tulu_mega.config.stages import (
    DpoSettings,
    EngineSettings,
    GenerateSettings,
    PreferenceStageSettings,
    RmSettings,
    RunSettings,
    ScoreSettings,
    SftSettings,
    StageSettings,
)

__all__ = [
    "CheckpointSettings",
    "DataInspectSettings",
    "DataMixSettings",
    "DataSettings",
    "DecontaminateSettings",
    "DpoSettings",
    "EngineSettings",
    "GenerateSettings",
    "GrpoSettings",
    "GrpoTrainSettings",
    "HeldOutSettings",
    "ModelSettings",
    "OptimSettings",
    "ParallelSettings",
    "PolicySettings",
    "PrecisionSettings",
    "PreferenceDataSettings",
    "PreferenceSettings",
    "PreferenceStageSettings",
    "PromptDataSettings",
    "PromptHeldOutSettings",
    "ReferenceSettings",
    "RewardSettings",
    "RmSettings",
    "RolloutSettings",
    "RunSettings",
    "SamplingSettings",
    "ScoreSettings",
    "Section",
    "ServeSettings",
    "SftSettings",
    "SpikeSettings",
    "StageSettings",
    "StragglerSettings",
    "TrainSettings",
    "WandbSettings",
    "WatchdogSettings",
    "describe",
    "load",
]
