"""Advice on a row of no known form: what comes nearest, and what to call its columns."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import SequenceMatcher

from tulu_mega.data.forms.table import FORMS, Form, Kind
from tulu_mega.data.forms.turns import Row

_ALIKE = 0.75
_MEANT = {
    "messages": ("dialogue", "dialog", "chat", "turns", "items", "history"),
    "conversations": ("dialogue", "dialog", "chat", "turns", "items"),
    "instruction": ("question", "query", "task", "problem", "inputs"),
    "output": ("answer", "answers", "completion", "target", "targets", "solution", "generation"),
    "prompt": ("question", "query", "problem", "instruction", "inputs", "input"),
    "completion": ("answer", "answers", "response", "output", "target", "targets", "solution"),
    "chosen": ("better", "preferred", "accepted", "response_chosen", "win", "winner", "response_j"),
    "rejected": ("worse", "dispreferred", "response_rejected", "lose", "loser", "response_k"),
}
"""Names that other data sets have for a column."""
_TRAINED_BY: dict[Kind, str] = {
    "conversation": "a conversation, which sft trains on",
    "pair": "a pair, which rm and dpo train on",
    "prompt": "a prompt, which grpo trains on and generate answers",
}


def advice(row: Row, kind: Kind, forms: Sequence[Form]) -> str:
    """What to do with a row, as the end of a message that says what it has; empty where nothing comes near.

    Args:
        kind: what was wanted of it.
        forms: those that it might have been of.
    """
    others = [other for other in FORMS if other != kind and any(_has(form, row) for form in FORMS[other])]
    if kind != "prompt" and others and (kind == "pair" or "pair" in others):
        return f". This is {_TRAINED_BY[others[0] if kind == 'pair' else 'pair']}"
    names = [str(name) for name, value in row.items() if value is not None]
    nearest, renamed, share = None, {}, 0.0
    for form in forms:
        if _has_columns(form, row):  # what is in them is another thing
            continue
        found = _meant(form, names)
        if len(found) / len(form.needed) > share:
            nearest, renamed, share = form, found, len(found) / len(form.needed)
    if all(isinstance(row.get(side), str) for side in ("chosen", "rejected")) and share < 1:
        return (
            ". They are texts that do not say what they answer: give it in prompt, or dialogues of HH-RLHF's form "
            r"(\n\nHuman: ...\n\nAssistant: ...)"
        )
    if nearest is None:
        known = "; ".join(f"{form.name}: {form.wanted()}" for form in forms)
        return f". Known forms (data.format) are {known}" if len(forms) > 1 else ""
    renames = [f"{name} to {needed}" for needed, name in renamed.items() if name != needed]
    missing = [first for first, *_ in nearest.needed if first not in renamed]
    told = [f"rename {' and '.join(renames)}"] if renames else []
    told += [f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing"] if missing else []
    return f". The nearest form is {nearest.name}, of {nearest.wanted()}: {', '.join(told)}"


def _has_columns(form: Form, row: Row) -> bool:
    return form.columns(row) is not None


def _has(form: Form, row: Row) -> bool:
    return _has_columns(form, row) and form.fits(row)


def _meant(form: Form, names: Sequence[str]) -> dict[str, str]:
    """The columns of a form (by the first of their names), and the row's that are one or may be meant by one."""
    found: dict[str, str] = {}
    for needed in form.needed:
        left = [name for name in names if name not in found.values()]
        exact = [name for name in left if name in needed]
        alike = [name for name in left if name.lower() in _MEANT.get(needed[0], ()) or _alike(name, needed)]
        if exact or alike:
            found[needed[0]] = (exact or alike)[0]
    return found


def _alike(name: str, needed: Sequence[str]) -> bool:
    return any(SequenceMatcher(None, name.lower(), one).ratio() >= _ALIKE for one in needed)
