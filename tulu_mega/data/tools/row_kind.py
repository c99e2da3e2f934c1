"""Whether a run's rows are conversations or pairs, where its settings do not say."""

from __future__ import annotations

from contextlib import suppress
from typing import Any, TypeVar

from tulu_mega.config import DataInspectSettings, DataMixSettings, DataSettings, PreferenceDataSettings
from tulu_mega.data.encoding import ConversationEncoding, PairEncoding
from tulu_mega.data.sources import load_rows
from tulu_mega.errors import UserError

OfARun = TypeVar("OfARun", DataInspectSettings, DataMixSettings)

_LOOKED_AT = 100
"""Rows at most, until one can be read."""


def of_its_kind(settings: OfARun) -> OfARun:
    """The settings with ``pairs`` said and ``data`` of that kind; by the first row that can be read where they do not say.

    A row that is both counts as a conversation. Of what is wrong with the rows nothing is told here.
    """
    if settings.pairs is not None:
        return settings
    if not _begins_with_a_pair(settings.data):
        return settings.model_copy(update={"pairs": False})
    data = PreferenceDataSettings.model_validate(settings.data.model_dump(exclude_unset=True))
    return settings.model_copy(update={"pairs": True, "data": data})


def _begins_with_a_pair(data: DataSettings) -> bool:
    first = data.train if isinstance(data.train, str) else next(iter(data.train), "")
    split = data.split if isinstance(data.split, str) else data.split.get(first, "train")
    with suppress(UserError):
        rows = load_rows(first, split, any_columns=True)
        for index in range(min(len(rows), _LOOKED_AT)):
            with suppress(ValueError):
                return _is_pair(rows.row(index))
    return False


def _is_pair(row: dict[str, Any]) -> bool:
    if row.get("messages") is not None or ConversationEncoding.tokenised(row):
        return False
    return PairEncoding.tokenised(row) or None not in (row.get("chosen"), row.get("rejected"))
