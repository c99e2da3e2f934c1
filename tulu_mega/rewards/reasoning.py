"""The part of a reply that is judged: its answer, without the reasoning between ``<think>`` and ``</think>``."""

from __future__ import annotations

_OPENS, _CLOSES = "<think>", "</think>"


def answer_of(response: str) -> str:
    """The reply behind its last ``</think>``; nothing where a ``<think>`` there is never closed.

    The opening tag may stand in the prompt, as templates of reasoning models have it. Reasoning that was cut off holds no
    answer, whatever it considered.

    >>> answer_of("<think>Is it 5?</think>It is 7."), answer_of("<think>Is it 5?"), answer_of("It is 7.")
    ('It is 7.', '', 'It is 7.')
    """
    answer = response.rpartition(_CLOSES)[2]
    return "" if _OPENS in answer else answer
