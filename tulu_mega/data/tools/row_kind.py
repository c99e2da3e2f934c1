"""Whether a run's rows are conversations or pairs, where its settings do not say."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from tulu_mega.config import DataInspectSettings, DataMixSettings, DataSettings, FormName, PreferenceDataSettings
from tulu_mega.data.forms.reading import is_of, read
from tulu_mega.data.sources import load_rows
from tulu_mega.errors import UserError

OfARun = TypeVar("OfARun", DataInspectSettings, DataMixSettings)

_LOOKED_AT = 100
"""Most rows that are tried until one can be read."""


def of_its_kind(settings: OfARun) -> OfARun:
    """Return the settings with ``pairs`` set, by the first readable row where it is unset, and ``data`` of the matching class.

    A row that is both counts as a conversation. Malformed rows are reported elsewhere.
    """
    if settings.pairs is not None:
        return settings
    if not _begins_with_a_pair(settings.data):
        return settings.model_copy(update={"pairs": False})
    data = PreferenceDataSettings.model_validate(settings.data.model_dump(exclude_unset=True))
    return settings.model_copy(update={"pairs": True, "data": data})


def stages_of(table: Any) -> list[str]:
    """Return the stages that train on rows like the first one of [data] in a settings file; none where it cannot be read.

    Data sets of the hub are not fetched for this.
    """
    with suppress(ValueError):  # pydantic's included
        named = table if isinstance(table, dict) else {"train": table}
        settings = DataSettings.model_validate({name: named[name] for name in ("train", "split", "format") if name in named})
        row = _first(settings) if _here(settings) else None
        if row is None:
            return []
        if _is_pair(row, settings.format):
            return ["rm", "dpo"]
        kind = "conversation" if is_of(row, "conversation", settings.format) else "prompt"
        messages = read(row, kind, settings.format).row.get("messages")
        answered = isinstance(messages, list) and messages and isinstance(messages[-1], dict)
        if row.get("ground_truth") is not None and not (answered and messages[-1].get("role") == "assistant"):
            return ["grpo"]
        return ["sft"]
    return []


def _begins_with_a_pair(data: DataSettings) -> bool:
    row = _first(data)
    return row is not None and _is_pair(row, data.format)


def _here(data: DataSettings) -> bool:
    first = data.train if isinstance(data.train, str) else next(iter(data.train), "")
    return Path(first).expanduser().exists()


def _first(data: DataSettings) -> dict[str, Any] | None:
    """The first row that can be read."""
    first = data.train if isinstance(data.train, str) else next(iter(data.train), "")
    split = data.split if isinstance(data.split, str) else data.split.get(first, "train")
    with suppress(UserError):
        rows = load_rows(first, split)
        for index in range(min(len(rows), _LOOKED_AT)):
            with suppress(ValueError):
                return rows.row(index)
    return None


def _is_pair(row: dict[str, Any], form: FormName) -> bool:
    return is_of(row, "pair", form) and not is_of(row, "conversation", form)
