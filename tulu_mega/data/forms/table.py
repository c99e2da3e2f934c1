"""The forms of rows that are known, in the order in which they are looked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from tulu_mega.config import FormName
from tulu_mega.data.forms.dialogue import is_dialogue, whole
from tulu_mega.data.forms.rated import pair_of
from tulu_mega.data.forms.turns import Row, answer, asked, instructed, is_sharegpt, left, turns
from tulu_mega.data.messages import short

Kind = Literal["conversation", "pair", "prompt"]
"""What rows are used as: a conversation to learn, a pair of conversations, or a prompt to answer."""

_SIDES = ("chosen", "rejected")
_TALKS = ("conversations", "conversation")


def as_it_is(row: Row, columns: list[str]) -> Row:
    """Return the row unchanged."""
    return {}


@dataclass(frozen=True)
class Form:
    """A form of rows of one kind."""

    name: FormName
    needed: tuple[tuple[str, ...], ...]
    """columns that a row of the form has; where an entry lists several names, the first one that the row has counts"""
    read: Callable[[Row, list[str]], Row]
    """makes the row of its columns; a column that was read and is no longer needed becomes None"""
    beside: tuple[str, ...] = ()
    """further columns that the form reads"""
    fits: Callable[[Row], bool] = lambda row: True
    """whether the columns' values are of the form"""

    def columns(self, row: Row) -> list[str] | None:
        """The needed columns by their names in a row; None where it lacks one."""
        found = [next((name for name in names if row.get(name) is not None), None) for names in self.needed]
        return None if None in found else [name for name in found if name is not None]

    def wanted(self) -> str:
        """The needed columns, for messages: ``instruction and output (or response)``."""
        return " and ".join(f"{first} (or {', '.join(others)})" if others else first for first, *others in self.needed)


def _messages(row: Row, columns: list[str]) -> Row:
    return {"messages": turns(row[columns[0]], columns[0])}


def _alpaca(row: Row, columns: list[str]) -> Row:
    return {**left(row), "messages": [*instructed(row), {"role": "assistant", "content": _text(row, columns[1])}]}


def _prompt_and_completion(row: Row, columns: list[str]) -> Row:
    return {"messages": [*asked(row["prompt"], "prompt"), *answer(row["completion"], "completion")]}


def _pair(row: Row, columns: list[str]) -> Row:
    made = {name: turns(row[name], name) for name in _SIDES}
    return {**made, "prompt": turns(row["prompt"], "prompt")} if row.get("prompt") is not None else made


def _answers_to(row: Row, columns: list[str]) -> Row:
    """Return a pair of a row's two answers, behind the conversation that they follow where they do not hold it themselves."""
    made: Row = {name: answer(row[name], name) for name in _SIDES}
    talk = _talk(row)
    if talk is None and not all(any(_is_asking(message) for message in messages) for messages in made.values()):
        raise ValueError(f"chosen and rejected do not say what they answer; expected {_TALKS[0]} before them")
    return {**made, talk: None, "prompt": turns(row[talk], talk)} if talk else made


def _dialogues(row: Row, columns: list[str]) -> Row:
    made: Row = {}
    for name in _SIDES:
        try:
            made[name] = whole(row.get("prompt"), row[name])
        except ValueError as error:
            raise ValueError(f"{name} {error}") from None
    return made if is_dialogue(row.get("prompt")) else {**made, "prompt": row.get("prompt")}


def _instructed(row: Row, columns: list[str]) -> Row:
    return {**left(row), "messages": instructed(row)}


def _instructed_pair(row: Row, columns: list[str]) -> Row:
    return {**left(row), **{name: answer(row[name], name) for name in _SIDES}, "prompt": instructed(row)}


def _responses(row: Row, columns: list[str]) -> Row:
    prompt, *sides = columns
    answers = {name: answer(row[column], column) for name, column in zip(_SIDES, sides, strict=True)}
    return {**answers, "prompt": asked(row[prompt], prompt)}


def _rated(row: Row, columns: list[str]) -> Row:
    better, worse = pair_of(row["instruction"], row["completions"])
    prompt = asked(row["instruction"], "instruction")
    return {"chosen": answer(better, "chosen"), "rejected": answer(worse, "rejected"), "prompt": prompt}


def _text(row: Row, column: str) -> str:
    if not isinstance(row[column], str):
        raise ValueError(f"{column} is {short(row[column])}; expected text")
    return row[column]


def _texts(row: Row) -> bool:
    return all(isinstance(row.get(name), str) for name in _SIDES)


def _talk(row: Row) -> str | None:
    """Return the column with the conversation that chosen and rejected follow."""
    return next((name for name in (*_TALKS, "messages", "prompt") if row.get(name) is not None), None)


def _is_asking(message: Any) -> bool:
    return isinstance(message, dict) and message.get("role") == "user"


def _follow_a_talk(row: Row) -> bool:
    if any(is_sharegpt(row.get(name)) or isinstance(row.get(name), dict) for name in _SIDES):
        return True
    if any(row.get(name) is not None for name in _TALKS):
        return True
    # HuggingFaceH4's pairs have the whole chosen talk in messages once more
    return row.get("messages") is not None and row.get("prompt") is None and not any(_asks(row.get(name)) for name in _SIDES)


def _asks(side: Any) -> bool:
    return isinstance(side, list) and any(map(_is_asking, side))


def _dialogue(row: Row) -> bool:
    return _texts(row) and (is_dialogue(row.get("prompt")) or all(is_dialogue(row[name]) for name in _SIDES))


def _stands_alone(row: Row) -> bool:
    """Return whether the row has a conversation alone, without a chosen and a rejected answer to it."""
    return any(row.get(name) is None for name in _SIDES)


_INSTRUCTION = ("input", "context", "history")
_PAIR = (("chosen",), ("rejected",))
_PAIR_TOKENS = tuple((f"{side}_{name}",) for side in _SIDES for name in ("input_ids", "labels"))
FORMS: dict[Kind, tuple[Form, ...]] = {
    "conversation": (
        Form("tokens", (("input_ids",), ("labels",)), as_it_is),
        Form("messages", (("messages",),), _messages),
        Form("sharegpt", (_TALKS,), _messages, fits=_stands_alone),
        Form("alpaca", (("instruction",), ("output", "response")), _alpaca, _INSTRUCTION),
        Form("prompt", (("prompt",), ("completion",)), _prompt_and_completion),
    ),
    "pair": (
        Form("tokens", _PAIR_TOKENS, as_it_is),
        Form("messages", _PAIR, _pair, ("prompt",), lambda row: not _texts(row) and not _follow_a_talk(row)),
        Form("sharegpt", _PAIR, _answers_to, (), _follow_a_talk),
        Form("hh", _PAIR, _dialogues, ("prompt",), _dialogue),
        Form("alpaca", (("instruction",), *_PAIR), _instructed_pair, _INSTRUCTION, _texts),
        Form("prompt", (("prompt",), *_PAIR), _responses, (), _texts),
        Form("ultrafeedback", (("instruction",), ("completions",)), _rated),
        Form("ultrafeedback", (("instruction", "prompt"), ("chosen_response",), ("rejected_response",)), _responses),
    ),
    "prompt": (
        Form("messages", (("messages",),), _messages),
        Form("sharegpt", (_TALKS,), _messages),
        Form("alpaca", (("instruction",),), _instructed, _INSTRUCTION),
        Form("prompt", (("prompt",),), lambda row, columns: {"messages": asked(row["prompt"], "prompt")}),
    ),
}
"""By kind. The first of which a row has the columns is its form."""
