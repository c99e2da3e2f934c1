"""Fenced blocks of a reply, as CommonMark 0.31 (section 4.5) reads them."""

from __future__ import annotations

import re

_FENCE = re.compile(r"(`{3,}|~{3,})[ \t]*(.*)")
_WORD = re.compile(r"\w*")


def fenced_blocks(text: str) -> list[tuple[str, str]]:
    """The closed blocks in their order, each as the first word behind its opening fence and its content.

    A block ends at a fence of the same characters, no shorter, with nothing behind it, that is indented by at most three
    spaces more than the opening one: deeper ones stand in a docstring. Content loses the indentation of the opening fence.
    Departs from CommonMark in two things: a fence may be indented by more than three spaces, as in nested lists, and a block
    that is never closed is no block, for the reply was cut off.

    >>> fenced_blocks("1. So:\\n   ~~~python\\n   x = 1\\n   ~~~")
    [('python', 'x = 1\\n')]
    """
    blocks: list[tuple[str, str]] = []
    opening: tuple[str, str, int] | None = None
    content: list[str] = []
    for line in text.split("\n"):
        body = line.lstrip(" \t")
        indent, fence = len(line) - len(body), _FENCE.match(body)
        if opening is None:
            if fence and not (fence[1][0] == "`" and "`" in fence[2]):
                opening, content = (fence[1], _WORD.match(fence[2])[0], indent), []
            continue
        mark, word, depth = opening
        if fence and fence[1][0] == mark[0] and len(fence[1]) >= len(mark) and not fence[2].strip() and indent <= depth + 3:
            blocks.append((word, "".join(content)))
            opening = None
        else:
            content.append(line[min(indent, depth) :] + "\n")
    return blocks
