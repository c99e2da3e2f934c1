"""Which characters of a text can be seen."""

from __future__ import annotations

import unicodedata

_BLANK = frozenset("\u115f\u1160\u17b4\u17b5\u2800\u3164\uffa0")
"""Letters and signs by their category that show nothing: fillers of Hangul, inherent vowels of Khmer, Braille without dots."""


def is_visible(text: str) -> bool:
    """Whether anything of the text can be seen: no white space, control or format character, or mark without a letter.

    >>> is_visible(" \\u200b\\ufeff"), is_visible("\\u3164"), is_visible(" 4 ")
    (False, False, True)
    """
    return any(unicodedata.category(character)[0] not in "ZCM" and character not in _BLANK for character in text)
