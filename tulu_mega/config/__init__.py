"""Settings: pydantic, strict, frozen, importable without torch."""

from tulu_mega.config.commands import EngineSettings, GenerateSettings, ScoreSettings, SftSettings
from tulu_mega.config.data import DataInspectSettings, DataMixSettings, DecontaminateSettings
from tulu_mega.config.sections import (
    CheckpointSettings,
    DataSettings,
    ModelSettings,
    OptimSettings,
    ParallelSettings,
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
    "EngineSettings",
    "GenerateSettings",
    "ModelSettings",
    "OptimSettings",
    "ParallelSettings",
    "ScoreSettings",
    "Section",
    "SftSettings",
    "TrainSettings",
    "WandbSettings",
    "describe",
    "load",
]
