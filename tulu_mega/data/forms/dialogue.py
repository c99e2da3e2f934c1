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


def whole(prompt: Any, side: Any) -> Messages:
    """A dialogue's turns; of one that the row has the beginning of by itself, those of the beginning and of what answers it.

    Raises:
        ValueError: there is no dialogue, or the side begins another one than the prompt.
    """
    if not isinstance(side, str) or not is_dialogue(prompt) or (is_dialogue(side) and side.lstrip().startswith(prompt.strip())):
        return parsed(side)
    asked = parsed(prompt.rstrip())
    if asked[-1] == {"role": "assistant", "content": ""}:  # the mark behind which the answer stands
        asked = asked[:-1]
    answered = parsed(side if is_dialogue(side) else f"Assistant: {side.removeprefix(' ')}")
    if asked and asked[-1]["role"] == "assistant":
        raise ValueError("answers a prompt that ends with the assistant's turn; expected one that ends with a human's")
    if answered[0]["role"] != "assistant":
        raise ValueError("begins with a dialogue of its own, which is not that of the prompt column; leave one of them out")
    return [*asked, *answered]
