"""The day that a chat template writes: for all starts of a run it is the day of the first."""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import date, datetime, time

_MARK = re.compile(r"\{#day (\d{4}-\d\d-\d\d)#\}")
CLOCK = "strftime_now"
"""transformers' function that templates read the clock by."""


def dated(template: str | Mapping[str, str] | None, day: str | None) -> str | dict[str, str] | None:
    """A tokenizer's chat template, or its several by name, for a day; as it is where it does not read the clock.

    The day stands in the text, so whatever is made of a template by its text is made anew for another day.

    Args:
        day: ``2026-11-30``; None for the one on which it is rendered.
    """
    if isinstance(template, Mapping):
        return {name: dated(each, day) for name, each in template.items()}
    return f"{{#day {day}#}}{template}" if day and template and CLOCK in template else template


def taken_apart(template: str) -> tuple[datetime, str]:
    """The time that a template may know, midnight of its day or of today, and its text."""
    mark = _MARK.match(template)
    day = date.fromisoformat(mark[1]) if mark else date.today()
    return datetime.combine(day, time.min), template[mark.end() :] if mark else template


def told(template: str) -> str | None:
    """A line about the day that a template writes; None where it reads no clock."""
    if CLOCK not in template:
        return None
    mark = _MARK.match(template)
    day = f"of {mark[1]}, the run's first start" if mark else "of the day on which the command runs"
    return f"the chat template writes a date, that {day}"
