"""Arguments of instruction-following constraints: their types, and readers that check what a row gives."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, NewType

if TYPE_CHECKING:
    from langdetect import DetectorFactory

Quantifier = Literal["at least", "around", "at most"]
Relation = Literal["less than", "at least"]
"""Comparisons of counts; IFEval has these two alone"""
Letter = NewType("Letter", str)
Index = NewType("Index", int)
Language = NewType("Language", str)
Options = NewType("Options", list)
_LARGEST_COUNT = 10**12
"""Largest count that is accepted: no reply reaches it, and larger ones overflow a float."""


@functools.cache
def languages() -> DetectorFactory:
    """The language detector, loaded once, with a fixed seed."""
    from langdetect import PROFILES_DIRECTORY, DetectorFactory  # a second, for those who need it

    factory = DetectorFactory()
    factory.set_seed(0)
    factory.load_profile(PROFILES_DIRECTORY)
    return factory


def _count(value: Any) -> int:
    whole = type(value) is int or (isinstance(value, float) and value.is_integer())  # NaN and infinities are not
    if not whole or not 0 <= value <= _LARGEST_COUNT:
        raise ValueError("a count")
    return int(value)  # tables with gaps turn integers into floats


def _index(value: Any) -> int:
    if _count(value) < 1:
        raise ValueError("a count from 1")
    return int(value)


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError("a text")
    return value


def _letter(value: Any) -> str:
    if not isinstance(value, str) or len(value) != 1:
        raise ValueError("a single letter")
    return value


def _words(value: Any) -> list[str]:
    if not isinstance(value, list) or not value or not all(isinstance(word, str) and word for word in value):
        raise ValueError("a list of words")
    return value


def _options(value: Any) -> list[str]:
    if isinstance(value, str):
        try:
            value = list(ast.literal_eval(value))
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            value = [option.strip(" '\"") for option in re.split(r"[,/;]", value)]
    return _words(value)


def _quantifier(value: Any) -> str:
    if value not in ("at least", "around", "at most"):
        raise ValueError("'at least', 'around' or 'at most'")
    return value


def _relation(value: Any) -> str:
    if value not in ("less than", "at least"):
        raise ValueError("'less than' or 'at least'")
    return value


def _language(value: Any) -> str:
    if value not in languages().get_lang_list():
        raise ValueError(f"one of the languages {', '.join(sorted(languages().get_lang_list()))}")
    return value


READERS: dict[Any, Callable[[Any], Any]] = {
    int: _count,
    str: _text,
    list[str]: _words,
    Quantifier: _quantifier,
    Relation: _relation,
    Letter: _letter,
    Index: _index,
    Language: _language,
    Options: _options,
}
"""Type of an argument -> its reader, which raises ValueError with what it expected."""
