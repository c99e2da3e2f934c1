"""One row of the data set to tokens and labels."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from tulu_mega.data.chat import Template, encode
from tulu_mega.records import IGNORE

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_LARGEST = 2**31 - 1


class Encoded(NamedTuple):
    """Tokens and labels of a row, int32, labels not shifted."""

    ids: np.ndarray
    labels: np.ndarray
    cut: int
    """tokens beyond the longest sequence, which are not among ``ids``"""


@dataclass(frozen=True)
class Encoding:
    """How rows become tokens, and which rows are left out."""

    tokenizer: PreTrainedTokenizerFast
    template: Template
    max_length: int
    overlong: Literal["truncate", "reject"] = "truncate"
    malformed: Literal["error", "reject"] = "error"

    def __call__(self, row: dict[str, Any]) -> Encoded:
        """
        Args:
            row: ``messages``, or ``input_ids`` and ``labels``, which are taken as they are and win where both are given.

        Returns:
            At most ``max_length`` tokens, whatever ``overlong`` says.

        Raises:
            ValueError: the row is neither, or malformed.
            UserError: the tokenizer does not do.
        """
        if row.get("input_ids") is not None and row.get("labels") is not None:
            ids, labels = _tokens(row, "input_ids", 0), _tokens(row, "labels", IGNORE)
            if len(ids) != len(labels):
                raise ValueError(f"{len(ids)} input_ids but {len(labels)} labels; expected as many")
            return self._cut(ids, labels)
        if row.get("messages") is None:
            keys = ", ".join(islice((str(key) for key, value in row.items() if value is not None), 8)) or "nothing"
            raise ValueError(f"has {keys}; expected messages, or input_ids and labels")
        ids, labels = encode(row["messages"], self.tokenizer, self.template, None)
        return self._cut(np.array(ids, np.int32), np.array(labels, np.int32))

    def _cut(self, ids: np.ndarray, labels: np.ndarray) -> Encoded:
        return Encoded(ids[: self.max_length], labels[: self.max_length], max(0, len(ids) - self.max_length))


def supervised(labels: np.ndarray) -> int:
    """Tokens that are predicted and trained; the first token of a sequence is never predicted."""
    return int(np.count_nonzero(labels[1:] != IGNORE))


def _tokens(row: dict[str, Any], name: str, least: int) -> np.ndarray:
    values = row[name]
    if not isinstance(values, list) or not values:
        raise ValueError(f"{name} is {type(values).__name__} of {values!r:.60}; expected a list of at least one token")
    for position, value in enumerate(values):
        if type(value) is not int or not (0 <= value <= _LARGEST or value == least):
            also = f", {IGNORE} where not trained" if least == IGNORE else ""
            raise ValueError(f"{name}[{position}] is {value!r:.60}; expected a whole number of 0 to {_LARGEST}{also}")
    return np.array(values, np.int32)
