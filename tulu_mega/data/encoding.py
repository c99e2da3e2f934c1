"""One row of the data set to tokens and labels."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

import numpy as np

from tulu_mega.config import FormName
from tulu_mega.data.chat import Sequence, Template, Turns, encodings
from tulu_mega.data.forms.rated import Useless
from tulu_mega.data.forms.reading import read
from tulu_mega.data.forms.table import Kind
from tulu_mega.data.messages import PROMPT_COLUMNS, Given, Messages, conversation_of, short
from tulu_mega.records import IGNORE

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_LARGEST = 2**31 - 1


class Encoded(NamedTuple):
    """Tokens and labels of a sequence, int32, labels not shifted."""

    ids: np.ndarray
    labels: np.ndarray
    cut: int
    """number of tokens that were cut off because the sequence was too long"""
    ends: tuple[int, ...] = ()
    """the last token of each trained turn that ``ids`` holds whole; empty for rows that had tokens already"""


class EncodedRow(NamedTuple):
    """The sequences as which a row is trained."""

    sequences: list[Encoded]
    told: Counter[str]
    """counts of what was changed or not used, by the names that `data.told` explains"""


@dataclass(frozen=True)
class Encoding(ABC):
    """How rows become tokens, and which rows are left out."""

    tokenizer: PreTrainedTokenizerFast | None
    """the tokenizer; None where every row has tokens already"""
    template: Template
    max_length: int
    overlong: Literal["truncate", "reject"] = "truncate"
    malformed: Literal["error", "reject"] = "error"
    rewritten: Literal["leave", "split"] = "leave"
    """what happens to a turn that the template writes otherwise once more turns follow"""
    form: FormName = "auto"
    """the rows' form"""
    width: ClassVar[int]
    """number of sequences that belong together (2 in a pair); a row gives this number or a multiple of it"""
    token_columns: ClassVar[tuple[str, ...]]
    """columns of a row that has tokens already"""
    mask_columns: ClassVar[tuple[str, ...]]
    """columns of such a row that mark its padding"""
    chat_columns: ClassVar[tuple[str, ...]]
    """columns of a row of conversations"""

    @abstractmethod
    def __call__(self, row: dict[str, Any]) -> EncodedRow:
        """
        Returns:
            ``width`` sequences of at most ``max_length`` tokens, whatever ``overlong`` says; or several times ``width``.

        Raises:
            ValueError: the row is of another form, or malformed.
            Useless: nothing can be learned from it.
            UserError: the tokenizer does not do.
        """

    @classmethod
    def tokenised(cls, row: dict[str, Any]) -> bool:
        """Whether the row has tokens already, which are taken as they are: no tokenizer is needed."""
        return all(row.get(name) is not None for name in cls.token_columns)

    def _read(self, row: dict[str, Any], kind: Kind, used: tuple[str, ...]) -> tuple[dict[str, Any], Counter[str], bool]:
        """Return the row in the form that is encoded, counts of its unused columns, and whether it has tokens already.

        Args:
            used: columns that are used beside those of the form.
        """
        made = read(row, kind, self.form)
        tokenised = made.form == "tokens"
        told = self._told(made.row, (self.token_columns + self.mask_columns if tokenised else self.chat_columns) + used)
        told.update(f"column {name}" for name in made.unused)
        if made.form not in ("messages", "tokens"):
            told[f"form {made.form}"] += 1
        return made.row, told, tokenised

    def key(self) -> list[Any]:
        """Return everything beside rows and tokenizer that decides the tokens, for JSON."""
        return [self.template, self.max_length, self.overlong, self.malformed, self.rewritten, self.form]

    def margin(self, row: dict[str, Any]) -> float:
        """Return by how much the row's first sequence is better than its second."""
        return 0.0

    def _told(self, row: dict[str, Any], used: tuple[str, ...]) -> Counter[str]:
        """Count the columns that have a value and are not used."""
        return Counter(f"column {name}" for name, value in row.items() if value is not None and name not in used)

    def _tokenised(self, row: dict[str, Any], prefix: str, told: Counter[str]) -> Encoded:
        """The tokens of a row that has them, without padding."""
        ids_name, labels_name, mask_name = (f"{prefix}{name}" for name in ("input_ids", "labels", "attention_mask"))
        ids, labels = _tokens(row, ids_name, 0), _tokens(row, labels_name, IGNORE)
        if len(ids) != len(labels):
            raise ValueError(f"{len(ids)} {ids_name} but {len(labels)} {labels_name}; expected as many")
        if row.get(mask_name) is not None:
            kept = _attended(row[mask_name], len(ids), mask_name)
            told["padding"] += kept.stop - kept.start < len(ids)
            ids, labels = ids[kept], labels[kept]
        _check_unshifted(ids, labels, ids_name, labels_name)
        return self._cut(ids, labels)

    def _rendered(self, messages: Messages, given: Given, turns: Turns, told: Counter[str]) -> list[Encoded]:
        """Return the sequences of a conversation: those of turns that the template writes otherwise later, then the whole."""
        made = encodings(messages, self.tokenizer, self.template, turns, given)
        told.update(f"field {name}" for name in made.unread)
        told["altered"] += made.altered
        if made.rewritten:
            told["rewritten"] += len(made.rewritten)
            told["rewritten rows"] += 1
        if self.rewritten == "leave" or not made.rewritten:
            return [self._cut_turns(made.whole)]
        # a conversation of which nothing is trained is told as such, not dropped
        return [self._cut_turns(one) for one in (*made.rewritten, made.whole) if one.ends] or [self._cut_turns(made.whole)]

    def _cut_turns(self, made: Sequence) -> Encoded:
        ids, labels, cut, _ = self._cut(np.array(made.ids, np.int32), np.array(made.labels, np.int32))
        return Encoded(ids, labels, cut, tuple(token for token, length in made.ends if length <= len(ids)))

    def _cut(self, ids: np.ndarray, labels: np.ndarray) -> Encoded:
        return Encoded(ids[: self.max_length], labels[: self.max_length], max(0, len(ids) - self.max_length))


@dataclass(frozen=True)
class ConversationEncoding(Encoding):
    """Rows of ``messages``, of another form that is read as such (:mod:`tulu_mega.data.forms`), or of ``input_ids`` and
    ``labels``, which are taken as they are and win where both are given.

    A row gives one sequence, or with ``rewritten = "split"`` further ones: a turn that the template writes otherwise once more
    follows is the last of a sequence of its own.
    """

    width: ClassVar[int] = 1
    token_columns: ClassVar[tuple[str, ...]] = ("input_ids", "labels")
    mask_columns: ClassVar[tuple[str, ...]] = ("attention_mask",)
    chat_columns: ClassVar[tuple[str, ...]] = ("messages", *PROMPT_COLUMNS)

    def __call__(self, row: dict[str, Any]) -> EncodedRow:
        row, told, tokenised = self._read(row, "conversation", ())
        if tokenised:
            return EncodedRow([self._tokenised(row, "", told)], told)
        messages, given = conversation_of(row, row["messages"], training=True)
        return EncodedRow(self._rendered(messages, given, "all", told), told)


@dataclass(frozen=True)
class PairEncoding(Encoding):
    """Rows of ``chosen`` and ``rejected``: conversations that part at the last message, the assistant's.

    Or of what parts alone, behind a ``prompt``: messages that come before both, or a text, which is the user's message. Or of
    ``chosen_input_ids``, ``chosen_labels``, ``rejected_input_ids``, ``rejected_labels``, which are taken as they are and win
    where both are given.
    """

    turns: Turns = "all"
    """which of the assistant's turns have log-probabilities that count"""
    margin_column: str | None = None
    width: ClassVar[int] = 2
    token_columns: ClassVar[tuple[str, ...]] = ("chosen_input_ids", "chosen_labels", "rejected_input_ids", "rejected_labels")

    mask_columns: ClassVar[tuple[str, ...]] = ("chosen_attention_mask", "rejected_attention_mask")
    chat_columns: ClassVar[tuple[str, ...]] = ("chosen", "rejected", *PROMPT_COLUMNS)

    def __call__(self, row: dict[str, Any]) -> EncodedRow:
        """The chosen sequence, then the rejected one."""
        margin = () if self.margin_column is None else (self.margin_column,)
        row, told, tokenised = self._read(row, "pair", margin)
        if tokenised:
            pair = [self._tokenised(row, side, told) for side in ("chosen_", "rejected_")]
        else:
            sides, given, prompted = _sides(row)
            if prompted:  # another one that nobody looks at may be told, too
                told -= Counter({"column prompt": 1})
            pair = [one for messages in sides for one in self._rendered(messages, given, self.turns, told)]
            told["rewritten rows"] = min(told["rewritten rows"], 1)
        chosen, rejected = pair
        same = np.array_equal(chosen.ids, rejected.ids) and np.array_equal(chosen.labels, rejected.labels)
        if same and supervised(chosen.labels):
            kept = f" among the first {self.max_length} tokens" if chosen.cut or rejected.cut else ""
            raise Useless(f"chosen and rejected are the same{kept}")
        return EncodedRow(pair, told)

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


def _sides(row: dict[str, Any]) -> tuple[list[Messages], Given, bool]:
    """Both conversations, what the row gives beside them, and whether its ``prompt`` is part of them."""
    sides, prompted = [], False
    for side in ("chosen", "rejected"):
        try:
            given_messages, with_prompt = _behind_prompt(row.get("prompt"), row[side])
            messages, given = conversation_of(row, given_messages, training=True)
        except ValueError as error:
            raise ValueError(f"{side}: {error}") from None
        if messages[-1]["role"] != "assistant":
            raise ValueError(f"{side}: the last message is the {messages[-1]['role']}'s; expected the assistant's response")
        sides.append(messages)
        prompted |= with_prompt
    chosen, rejected = sides
    if chosen[:-1] != rejected[:-1]:
        at = next((n for n, (a, b) in enumerate(zip(chosen[:-1], rejected[:-1], strict=False), 1) if a != b), None)
        where = f"at message {at}" if at else f"in length ({len(chosen) - 1} and {len(rejected) - 1} messages)"
        raise ValueError(f"the prompts of chosen and rejected differ {where}; expected the same messages but for the last")
    if all(message["role"] in ("assistant", "system") for message in chosen[:-1]):
        raise ValueError("chosen and rejected do not say what they answer; expected the user's message before them, or in prompt")
    return sides, given, prompted


def _behind_prompt(prompt: Any, side: Any) -> tuple[Any, bool]:
    """A side with the row's ``prompt`` before it where it does not begin with it, and whether it holds the prompt.

    A prompt that is text is taken where the side has none of its own; else it is one more column, as in data sets that have the
    question once more by itself.
    """
    if not isinstance(side, list) or not all(isinstance(message, dict) for message in side) or prompt in (None, [], ""):
        return side, False
    if isinstance(prompt, str):
        if any(message.get("role") not in ("assistant", "system") for message in side):
            return side, False
        system = [message for message in side[:1] if message.get("role") == "system"]
        return [*system, {"role": "user", "content": prompt}, *side[len(system) :]], True
    if not isinstance(prompt, list) or not all(isinstance(message, dict) for message in prompt):
        raise ValueError(f"prompt is {short(prompt)}; expected messages, or a text")
    if _said(side[: len(prompt)]) == _said(prompt) and len(side) > len(prompt):
        return side, True
    if prompt[-1].get("role") == "assistant":
        raise ValueError("the last message of prompt is the assistant's; expected the message that is answered")
    if side and side[0].get("role") in ("system", "user"):
        raise ValueError("begins with a prompt of its own, which is not that of the prompt column; leave one of them out")
    return [*prompt, *side], True


def _said(messages: list[dict[str, Any]]) -> list[tuple[Any, Any]]:
    return [(message.get("role"), message.get("content")) for message in messages]


def _attended(mask: Any, length: int, name: str) -> slice:
    """Where a mask is 1. Raises ValueError where it is no mask of padding."""
    if not isinstance(mask, list) or len(mask) != length or any(value not in (0, 1) for value in mask):
        raise ValueError(f"{name} is {short(mask)}; expected {length} values of 0 or 1, as many as tokens")
    if 1 not in mask:
        raise ValueError(f"{name} is 0 throughout; expected at least one token")
    start, count = mask.index(1), int(sum(mask))
    if not all(mask[start : start + count]):
        raise ValueError(f"{name} is 0 between tokens; expected 0 for padding alone, before or behind them")
    return slice(start, start + count)


def _check_unshifted(ids: np.ndarray, labels: np.ndarray, ids_name: str, labels_name: str) -> None:
    wrong = np.flatnonzero((labels != IGNORE) & (labels != ids))
    if not len(wrong):
        return
    at = int(wrong[0])
    following = labels[:-1] != IGNORE
    shifted = bool(following.any()) and bool(np.all(labels[:-1][following] == ids[1:][following]))
    hint = "they are the next tokens, shifted already; give them unshifted" if shifted else f"expected its token, or {IGNORE}"
    raise ValueError(f"{labels_name}[{at}] is {labels[at]}, but {ids_name}[{at}] is {ids[at]}: {hint}")


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
