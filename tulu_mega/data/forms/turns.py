"""Single columns of foreign rows as messages."""

from __future__ import annotations

from typing import Any

from tulu_mega.data.messages import FURTHER_ROLES, ROLES, Messages, short
from tulu_mega.outside.json_input import read_whole_json

Row = dict[str, Any]

SPEAKERS = {
    **{role: role for role in (*ROLES, *FURTHER_ROLES)},
    **dict.fromkeys(("human", "prompter"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "bing", "bard", "model", "bot"), "assistant"),
    **dict.fromkeys(("observation", "tool_response", "function_response"), "tool"),
}
"""What ShareGPT's `from` says, and the role that it means. `function_call` is the assistant's, too."""


def turns(value: Any, name: str) -> Any:
    """A column's messages, those of ShareGPT's form (`from` and `value`) as `role` and `content`; other values as they are.

    Args:
        name: the column's, for messages.

    Raises:
        ValueError: somebody unknown speaks, or a call of a function is no JSON.
    """
    if not isinstance(value, list):
        return value
    return [turn(message, f"{name}: message {number}") for number, message in enumerate(value, 1)]


def turn(message: Any, where: str) -> Any:
    """One message; see :func:`turns`."""
    if not _is_sharegpt(message):
        return message
    speaker, text, content = message["from"], message.get("value"), message.get("content")
    if None not in (text, content) and text != content:
        raise ValueError(f"{where} has a value and another content; leave one of them out")
    text = content if text is None else text
    rest = {name: value for name, value in message.items() if name not in ("from", "value", "role", "content")}
    known = speaker.strip().lower() if isinstance(speaker, str) else ""
    if known == "function_call":
        return {"role": "assistant", "content": "", "tool_calls": _calls(text, where), **rest}
    if known not in SPEAKERS:
        names = ", ".join(sorted({*SPEAKERS, "function_call"}))
        raise ValueError(f"{where} is from {short(speaker)}; expected one of {names}")
    return {"role": SPEAKERS[known], "content": text, **rest}


def is_sharegpt(value: Any) -> bool:
    """Whether a column has messages of ShareGPT's form."""
    return any(map(_is_sharegpt, value if isinstance(value, list) else [value]))


def answer(value: Any, name: str) -> Messages:
    """What answers a prompt, as messages: a text is the assistant's, a single message a list of one.

    Raises:
        ValueError: it is neither, nor messages.
    """
    return _said("assistant", value, name)


def asked(value: Any, name: str) -> Messages:
    """A prompt as messages: a text is the user's, a single message a list of one.

    Raises:
        ValueError: it is neither, nor messages.
    """
    return _said("user", value, name)


def instructed(row: Row) -> Messages:
    """The prompt of Alpaca's form: earlier questions and answers in `history`, then `instruction`, and `input` (Dolly's
    `context`) in a line below.

    Raises:
        ValueError: a column of another form.
    """
    context = _context(row)
    lines = {name: row[name] for name in ("instruction", context) if row.get(name) not in (None, "")}
    for name, text in lines.items():
        if not isinstance(text, str):
            raise ValueError(f"{name} is {short(text)}; expected text")
    before: Messages = []
    history = row.get("history") or []
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise ValueError(f"history is {short(history)}; expected a list of pairs, what was asked and what was answered")
    for question, answer in history:
        before += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return [*before, {"role": "user", "content": "\n".join(lines.values())}]


def left(row: Row) -> Row:
    """What a row of Alpaca's form has that its prompt does not: the context beside an input."""
    return {"context": row["context"]} if row.get("context") not in (None, "") and _context(row) == "input" else {}


def _context(row: Row) -> str:
    """The column below the instruction: the first that says something."""
    return "context" if row.get("input") in (None, "") else "input"


def _said(role: str, value: Any, name: str) -> Messages:
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    found = turns([value] if isinstance(value, dict) else value, name)
    if not isinstance(found, list):
        raise ValueError(f"{name} is {short(value)}; expected text, or messages")
    return found


def _is_sharegpt(message: Any) -> bool:
    return isinstance(message, dict) and message.get("from") is not None and message.get("role") is None


def _calls(text: Any, where: str) -> list[dict[str, Any]]:
    """A call of a function, or a list of them, as its text spells it."""
    try:
        calls = read_whole_json(text) if isinstance(text, str) else text
    except ValueError:
        calls = None
    calls = [calls] if isinstance(calls, dict) else calls
    if not isinstance(calls, list) or not calls or not all(isinstance(call, dict) and "name" in call for call in calls):
        raise ValueError(f"{where} is a function_call with {short(text)}; expected JSON with name and arguments, or a list of it")
    return [{"type": "function", "function": call} for call in calls]
