"""A row of any known form, read into the form that is encoded."""

from __future__ import annotations

from itertools import islice
from typing import NamedTuple

from tulu_mega.config import FormName
from tulu_mega.data.forms.nearest import advice
from tulu_mega.data.forms.rated import Useless
from tulu_mega.data.forms.table import FORMS, Form, Kind, as_it_is
from tulu_mega.data.forms.turns import Row, turns

_EXPECTED: dict[Kind, str] = {
    "conversation": "messages, or input_ids and labels",
    "pair": "chosen and rejected, each a list of messages",
    "prompt": "messages, the prompt as a list of turns",
}
_OF_PAIRS: tuple[FormName, ...] = ("hh", "ultrafeedback")


class Read(NamedTuple):
    """A row in the form that is encoded."""

    row: Row
    form: FormName
    """name of the form that the row had"""
    unused: tuple[str, ...] = ()
    """columns that are not used because the columns that were read hold the same"""


def read(row: Row, kind: Kind, named: FormName = "auto") -> Read:
    """A row with `messages`, or `chosen` and `rejected`, whatever its columns are; further columns stay.

    Args:
        row: a row as its data set has it.
        kind: what is wanted of it.
        named: the form that it is of; `auto` takes the first one of which it has the columns.

    Raises:
        ValueError: it is of no known form or not of the one that is named, or its columns hold something else.
        Useless: it is in order, but there is nothing to learn from it.
    """
    found = _form(row, kind, named)
    if found is None:
        raise ValueError(_refusal(row, kind, named))
    form, columns = found
    if form.read is as_it_is:
        return Read(row, form.name)
    made = form.read(row, columns)
    rest = {name: value for name, value in row.items() if name not in columns and name not in form.beside}
    unused = tuple(name for name, value in made.items() if value is not None and _left_out(name, rest.get(name), value))
    return Read({**rest, **made}, form.name, unused)


def _left_out(name: str, column: object, made: object) -> bool:
    """Return whether an unused column holds something that the row as read does not."""
    try:
        return column is not None and turns(column, name) != made
    except ValueError:
        return True


def is_of(row: Row, kind: Kind, named: FormName = "auto") -> bool:
    """Whether a row has the columns of a form of some kind."""
    return _form(row, kind, named) is not None


def form_name(row: Row, kind: Kind, named: FormName = "auto") -> str:
    """The form of a row, or ``unknown``."""
    found = _form(row, kind, named)
    return found[0].name if found else "unknown"


def any_messages(row: Row) -> list:
    """All messages of a row of any kind: of a pair the prompt and both answers.

    Raises:
        ValueError: it is of no known form, or its columns hold something else.
    """
    for kind in ("conversation", "pair", "prompt"):
        if not is_of(row, kind):
            continue
        try:
            made = read(row, kind).row
        except Useless:  # it has a prompt all the same
            continue
        names = ("prompt", "chosen", "rejected") if kind == "pair" else ("messages",)
        return [message for name in names if isinstance(made.get(name), list) for message in made[name]]
    raise ValueError(_refusal(row, "conversation", "auto"))


def _form(row: Row, kind: Kind, named: FormName) -> tuple[Form, list[str]] | None:
    for form in FORMS[kind]:
        if named in ("auto", form.name) and (columns := form.columns(row)) and (named != "auto" or form.fits(row)):
            return form, columns
    return None


def _refusal(row: Row, kind: Kind, named: FormName) -> str:
    """What a row has, what is expected, and what comes nearest."""
    there = ", ".join(islice((str(name) for name, value in row.items() if value is not None), 8)) or "nothing"
    forms = [form for form in FORMS[kind] if named in ("auto", form.name)]
    if not forms:
        known = ", ".join(dict.fromkeys(form.name for form in FORMS[kind]))
        hint = ", which are pairs: rm and dpo train on them" if named in _OF_PAIRS else ""
        return f"data.format = {named!r}{hint}; expected one of auto, {known}"
    expected = _EXPECTED[kind] if named == "auto" else f"{forms[0].wanted()}, by data.format = {named!r}"
    return f"has {there}; expected {expected}{advice(row, kind, forms)}"
