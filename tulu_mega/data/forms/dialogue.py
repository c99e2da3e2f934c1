"""Dialogues in one text, as Anthropic's HH-RLHF has them: ``\\n\\nHuman: ...\\n\\nAssistant: ...``."""

from __future__ import annotations

import re
from typing import Any

from tulu_mega.data.messages import Messages, short

_MARK = re.compile(r"(?:^|\n\n)(Human|Assistant):(?: |$|(?=\n))")
_BEGINNING = re.compile(r"\s*(?:Human|Assistant):(?: |$|(?=\n))")
_ROLES = {"Human": "user", "Assistant": "assistant"}


def is_dialogue(text: Any) -> bool:
    """Whether a text begins as such a dialogue does."""
    return isinstance(text, str) and _BEGINNING.match(text) is not None


def parsed(text: Any) -> Messages:
    """The turns of a dialogue, their texts as they stand between the marks.

    Raises:
        ValueError: it does not begin with a mark.
    """
    if not is_dialogue(text):
        raise ValueError(f"is {short(text)}; expected a dialogue that begins with 'Human: '")
    text = text.lstrip()
    marks = list(_MARK.finditer(text))
    ends = [mark.start() for mark in marks[1:]] + [len(text)]
    return [
        {"role": _ROLES[mark[1]], "content": text[mark.end() : end]} for mark, end in zip(marks, ends, strict=True)
    ]


def joined(prompt: Any, side: Any) -> Any:
    """A dialogue of which the row has the beginning by itself, as one text; one that is whole already as it is."""
    if not isinstance(side, str) or not is_dialogue(prompt) or (is_dialogue(side) and side.lstrip().startswith(prompt.strip())):
        return side
    asked = prompt.rstrip()
    mark = "" if asked.endswith("\n\nAssistant:") else "\n\nAssistant:"
    return f"{asked}{mark} {side.removeprefix(' ')}"
