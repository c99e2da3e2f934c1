"""What `tulu-mega data ...` takes."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from tulu_mega.config.dpo import DpoSettings
from tulu_mega.config.rm import RmSettings
from tulu_mega.config.run import EngineSettings
from tulu_mega.config.sections import (
    DataSettings,
    Fraction,
    PositiveInt,
    PreferenceDataSettings,
    Section,
    SftTrainSettings,
)
from tulu_mega.config.sft import SftSettings


class _OfARun(Section):
    """Accepts a file with the settings of `sft`, `rm` or `dpo`, and ignores the settings that it does not need."""

    data: DataSettings
    pairs: bool | None = None
    """Whether the rows are pairs, as for `rm` and `dpo`. Unset, they are where the file has [preference], [reference], data.turns
    or data.margin, or where the first row has chosen and rejected and no messages."""

    @model_validator(mode="before")
    @classmethod
    def _others_aside(cls, values: Any) -> Any:
        stages = [stage.model_fields.keys() for stage in (SftSettings, RmSettings, DpoSettings)]
        others = set().union(*stages) - cls.model_fields.keys()
        of_pairs = PreferenceDataSettings.model_fields.keys() - DataSettings.model_fields.keys()
        kept = {name: value for name, value in values.items() if name not in others}
        data = kept.get("data")
        if not isinstance(data, dict):
            return kept
        pairs = kept.get("pairs")
        if pairs is None:
            pairs = any(name in values for name in others - stages[0]) or any(name in data for name in of_pairs)
        if pairs is True:
            kept |= {"pairs": True, "data": PreferenceDataSettings.model_validate(data)}
        return kept


class DataInspectSettings(EngineSettings, _OfARun):
    """`tulu-mega data inspect`: what a run would train on. Takes the settings of `sft`, `rm` or `dpo`, writes nothing into the
    run's directory."""

    seed: int = SftSettings.model_fields["seed"].default
    """Seed of the run, which decides the order of its rows."""
    train: SftTrainSettings = SftTrainSettings()
    html: str | None = None
    """One self-contained page to write."""
    rows: PositiveInt = 5
    """Rows to show, spread over the data."""
    plan_steps: PositiveInt = 50
    """Steps to pack, spread over the run."""


class DataMixSettings(_OfARun):
    """`tulu-mega data mix`: the rows that `data.train` draws, as one file. Takes the settings of `sft`, `rm` or `dpo`; reads
    [data]."""

    output: str
    """JSONL to write; OUTPUT.sources.json beside it says what was drawn."""


class DecontaminateSettings(Section):
    """`tulu-mega data decontaminate`: training rows that hold evaluation rows, found by the n-grams they share."""

    train: str | list[str]
    """JSONL or Parquet files, or hub data sets; each is a set that is kept, cleaned or dropped."""
    evaluations: dict[str, str | list[str]]
    """Files or hub data sets (`owner/name:configuration`), each with the field, or fields, that hold its text."""
    output: str
    """Directory to write: report.json, matches.jsonl, NAME.clean.jsonl."""
    split: str = "train"
    """Split of training sets from the hub."""
    evaluation_split: str = "test"
    """Split of evaluations from the hub."""
    fields: list[str] = Field(["messages"], min_length=1)
    """Fields of training rows that hold text: text, lists of text, or messages."""
    roles: list[Literal["system", "user", "assistant"]] = Field(["user"], min_length=1)
    """Roles whose messages are searched."""
    ngram: PositiveInt = 8
    """Words in a run that is looked for."""
    threshold: Fraction = 0.5
    """A training row is contaminated when more than this share of an evaluation row's words lies in n-grams that it holds."""
    overlap: Fraction = 0.02
    """A set is cleaned or dropped when more than this share of an evaluation's rows is in it; 0 leaves nothing."""
    action: Literal["clean", "drop", "report"] = "clean"
    """What happens to such a set: `clean` leaves out its contaminated rows, `drop` all of it, `report` reports it only."""
    malformed: Literal["error", "reject"] = "error"
    """Training rows that cannot be read: `error` stops and names file and line, `reject` leaves
    them out of the cleaned set and counts them."""
    workers: PositiveInt | None = None
    """Processes; the machine's cores when unset."""

    @field_validator("evaluations")
    @classmethod
    def _some_field(cls, evaluations: dict[str, str | list[str]]) -> dict[str, str | list[str]]:
        empty = [name for name, fields in evaluations.items() if not fields]
        if empty or not evaluations:
            raise ValueError(f"{', '.join(empty) or 'no evaluation'}: name each file with the fields that hold its text")
        return evaluations
