"""Settings: pydantic, strict, frozen, importable without torch."""

from tulu_mega.config.commands import (
    DpoSettings,
    EngineSettings,
    GenerateSettings,
    PreferenceStageSettings,
    RmSettings,
    ScoreSettings,
    SftSettings,
    StageSettings,
)
from tulu_mega.config.data import DataInspectSettings, DataMixSettings, DecontaminateSettings
from tulu_mega.config.sections import (
    CheckpointSettings,
    DataSettings,
    HeldOutSettings,
    ModelSettings,
    OptimSettings,
    ParallelSettings,
    PreferenceDataSettings,
    PreferenceSettings,
    ReferenceSettings,
    Section,
    TrainSettings,
    WandbSettings,
)
from tulu_mega.config.source import describe, load

__all__ = [
    "CheckpointSettings",
    "DataInspectSettings",
    "DataMixSettings",
    "DataSettings",
    "DecontaminateSettings",
    "DpoSettings",
    "EngineSettings",
    "GenerateSettings",
    "HeldOutSettings",
    "ModelSettings",
    "OptimSettings",
    "ParallelSettings",
    "PreferenceDataSettings",
    "PreferenceSettings",
    "PreferenceStageSettings",
    "ReferenceSettings",
    "RmSettings",
    "ScoreSettings",
    "Section",
    "SftSettings",
    "StageSettings",
    "TrainSettings",
    "WandbSettings",
    "describe",
    "load",
]
