"""One row of the data set to tokens and labels."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

import numpy as np

from tulu_mega.data.chat import Template, Turns, check_messages, encode
from tulu_mega.records import IGNORE

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_LARGEST = 2**31 - 1


class Encoded(NamedTuple):
    """Tokens and labels of a sequence, int32, labels not shifted."""

    ids: np.ndarray
    labels: np.ndarray
    cut: int
    """tokens beyond the longest sequence, which are not among ``ids``"""


class Useless(Exception):
    """A row in order that nothing can be learned from; its text is the reason."""


@dataclass(frozen=True)
class Encoding(ABC):
    """How rows become tokens, and which rows are left out."""

    tokenizer: PreTrainedTokenizerFast | None
    """None where every row has tokens already"""
    template: Template
    max_length: int
    overlong: Literal["truncate", "reject"] = "truncate"
    malformed: Literal["error", "reject"] = "error"
    width: ClassVar[int]
    """sequences that a row gives"""
    token_columns: ClassVar[tuple[str, ...]]
    """of a row that has tokens already"""

    @abstractmethod
    def __call__(self, row: dict[str, Any]) -> list[Encoded]:
        """
        Returns:
            ``width`` sequences of at most ``max_length`` tokens, whatever ``overlong`` says.

        Raises:
            ValueError: the row is of another form, or malformed.
            Useless: nothing can be learned from it.
            UserError: the tokenizer does not do.
        """

    @classmethod
    def tokenised(cls, row: dict[str, Any]) -> bool:
        """Whether the row has tokens already, which are taken as they are: no tokenizer is needed."""
        return all(row.get(name) is not None for name in cls.token_columns)

    def key(self) -> list[Any]:
        """What the tokens depend on beside rows and tokenizer, for JSON."""
        return [self.max_length, self.overlong, self.malformed]

    def margin(self, row: dict[str, Any]) -> float:
        """By how much the row's first sequence is to be better than its second."""
        return 0.0

    def _tokenised(self, row: dict[str, Any], ids_name: str, labels_name: str) -> Encoded:
        ids, labels = _tokens(row, ids_name, 0), _tokens(row, labels_name, IGNORE)
        if len(ids) != len(labels):
            raise ValueError(f"{len(ids)} {ids_name} but {len(labels)} {labels_name}; expected as many")
        return self._cut(ids, labels)

    def _rendered(self, messages: Any, turns: Turns) -> Encoded:
        ids, labels = encode(messages, self.tokenizer, self.template, None, turns)
        return self._cut(np.array(ids, np.int32), np.array(labels, np.int32))

    def _cut(self, ids: np.ndarray, labels: np.ndarray) -> Encoded:
        return Encoded(ids[: self.max_length], labels[: self.max_length], max(0, len(ids) - self.max_length))


@dataclass(frozen=True)
class ConversationEncoding(Encoding):
    """Rows of ``messages``, or of ``input_ids`` and ``labels``, which are taken as they are and win where both are given."""

    width: ClassVar[int] = 1
    token_columns: ClassVar[tuple[str, ...]] = ("input_ids", "labels")

    def __call__(self, row: dict[str, Any]) -> list[Encoded]:
        if self.tokenised(row):
            return [self._tokenised(row, "input_ids", "labels")]
        if row.get("messages") is None:
            raise ValueError(f"has {_keys(row)}; expected messages, or input_ids and labels")
        return [self._rendered(row["messages"], "all")]


@dataclass(frozen=True)
class PairEncoding(Encoding):
    """Rows of ``chosen`` and ``rejected``: conversations that part at the last message, the assistant's.

    Or of ``chosen_input_ids``, ``chosen_labels``, ``rejected_input_ids``, ``rejected_labels``, which are taken as they are and
    win where both are given.
    """

    turns: Turns = "all"
    """of the assistant whose log-probabilities count"""
    margin_column: str | None = None
    width: ClassVar[int] = 2
    token_columns: ClassVar[tuple[str, ...]] = ("chosen_input_ids", "chosen_labels", "rejected_input_ids", "rejected_labels")

    def __call__(self, row: dict[str, Any]) -> list[Encoded]:
        """The chosen sequence, then the rejected one."""
        if self.tokenised(row):
            pair = [self._tokenised(row, f"{side}_input_ids", f"{side}_labels") for side in ("chosen", "rejected")]
        else:
            pair = [self._rendered(messages, self.turns) for messages in _sides(row)]
        chosen, rejected = pair
        same = np.array_equal(chosen.ids, rejected.ids) and np.array_equal(chosen.labels, rejected.labels)
        if same and supervised(chosen.labels):
            kept = f" among the first {self.max_length} tokens" if chosen.cut or rejected.cut else ""
            raise Useless(f"chosen and rejected are the same{kept}")
        return pair

    def key(self) -> list[Any]:
        return [*super().key(), self.turns, self.margin_column]

    def margin(self, row: dict[str, Any]) -> float:
        """
        Raises:
            ValueError: the column is missing or no number.
        """
        if self.margin_column is None:
            return 0.0
        value = row.get(self.margin_column)
        if isinstance(value, bool) or not isinstance(value, int | float) or not np.isfinite(value):
            raise ValueError(f"{self.margin_column} is {value!r:.60}; expected a number, by how much chosen is the better")
        return float(value)


def _sides(row: dict[str, Any]) -> list[list[dict[str, str]]]:
    sides = []
    for side in ("chosen", "rejected"):
        if row.get(side) is None:
            raise ValueError(f"has {_keys(row)}; expected chosen and rejected, each a list of messages")
        try:
            messages = check_messages(row[side], training=True)
        except ValueError as error:
            raise ValueError(f"{side}: {error}") from None
        if messages[-1]["role"] != "assistant":
            raise ValueError(f"{side}: the last message is the {messages[-1]['role']}'s; expected the assistant's response")
        sides.append(messages)
    chosen, rejected = sides
    if chosen[:-1] != rejected[:-1]:
        at = next((n for n, (a, b) in enumerate(zip(chosen[:-1], rejected[:-1], strict=False), 1) if a != b), None)
        where = f"at message {at}" if at else f"in length ({len(chosen) - 1} and {len(rejected) - 1} messages)"
        raise ValueError(f"the prompts of chosen and rejected differ {where}; expected the same messages but for the last")
    return sides


def supervised(labels: np.ndarray) -> int:
    """Tokens that are predicted and trained; the first token of a sequence is never predicted."""
    return int(np.count_nonzero(labels[1:] != IGNORE))


def _keys(row: dict[str, Any]) -> str:
    return ", ".join(islice((str(key) for key, value in row.items() if value is not None), 8)) or "nothing"


def _tokens(row: dict[str, Any], name: str, least: int) -> np.ndarray:
    values = row[name]
    if not isinstance(values, list) or not values:
        raise ValueError(f"{name} is {type(values).__name__} of {values!r:.60}; expected a list of at least one token")
    for position, value in enumerate(values):
        if type(value) is not int or not (0 <= value <= _LARGEST or value == least):
            also = f", {IGNORE} where not trained" if least == IGNORE else ""
            raise ValueError(f"{name}[{position}] is {value!r:.60}; expected a whole number of 0 to {_LARGEST}{also}")
    return np.array(values, np.int32)
