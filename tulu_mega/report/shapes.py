"""Tests for records of a run directory that the page can show. Other records, as a crash leaves them, are skipped."""

from __future__ import annotations

import math
from typing import Any

_MOST_STEPS = 1 << 53


def is_step(value: Any) -> bool:
    """Whether it numbers a step."""
    return type(value) is int and 0 <= value < _MOST_STEPS


def finite(value: Any) -> float | None:
    """A number as a float; None where it is none, or none that a float holds."""
    if not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        return None


def shows_rollout(record: Any) -> bool:
    """Whether it is a response of a step, with its prompt."""
    return (
        _asked(record)
        and isinstance(record.get("response"), str)
        and all(record.get(name) is None or finite(record[name]) is not None for name in ("reward", "verdict_reward"))
        and finite(record.get("advantage", 0.0)) is not None
        and is_step(record.get("place", 0))
        and is_step(record.get("sample", 0))
    )


def shows_sample(record: Any) -> bool:
    """Whether it is a problem of an evaluation, with its responses."""
    if not _asked(record) or not is_step(record.get("problem", 0)):
        return False
    responses = record.get("responses")
    first = responses[0] if isinstance(responses, list) and responses else None
    return isinstance(first, dict) and isinstance(first.get("response"), str) and isinstance(first.get("scores", {}), dict | None)


def shows_task(task: Any) -> bool:
    """Whether it is what results.json says of a task."""
    if not isinstance(task, dict) or not isinstance(metrics := task.get("metrics", {}), dict):
        return False
    return all(
        isinstance(each, dict) and all(finite(each.get(name)) is not None for name in ("value", "low", "high"))
        for each in metrics.values()
    )


def _asked(record: Any) -> bool:
    """Whether a record has a conversation that ends with a text."""
    messages = record.get("messages") if isinstance(record, dict) else None
    last = messages[-1] if isinstance(messages, list) and messages else None
    return isinstance(last, dict) and isinstance(last.get("content"), str)
