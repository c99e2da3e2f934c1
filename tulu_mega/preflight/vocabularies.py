"""Whether two models that are given the same token ids mean the same by them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tulu_mega.bridge.files.untrusted import read_json


def difference(one: Path, other: Path) -> str:
    """In words, the first token that two directories' tokenizers have under different ids; empty where there is none, or where
    one of them has no tokenizer.json, as a model that is only ever given ids needs none.

    Tokens that were added to a vocabulary are left out: one model's reserved token is another's padding.
    """
    (first, added), (second, more) = _vocabulary(one), _vocabulary(other)
    if not first or not second:
        return ""
    for token, number in first.items():
        there = second.get(token)
        if there != number and token not in added | more:
            return f"{token!r} is token {number} in {one} and {'none' if there is None else there} in {other}"
    return ""


def _vocabulary(directory: Path) -> tuple[dict[str, int], set[str]]:
    """Ids by token, and the tokens that were added; nothing where they cannot be read, which is somebody else's to say."""
    try:
        content: Any = read_json(directory / "tokenizer.json")
        told = content["model"]["vocab"]
        added = {each["content"] for each in content.get("added_tokens") or []}
        pieces = told.items() if isinstance(told, dict) else ((piece, number) for number, (piece, _score) in enumerate(told))
        return dict(pieces), added
    except (OSError, ValueError, KeyError, TypeError):
        return {}, set()
