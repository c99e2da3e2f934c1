"""Conversations as rows hold them: their messages checked, and what a row gives a chat template beside them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tulu_mega.outside.json_input import read_whole_json

ROLES = ("system", "user", "assistant")
FURTHER_ROLES = ("tool", "developer", "function", "ipython", "environment")
"""Roles that some of the tokenizers' templates know."""
TRAINING_FIELDS = ("weight", "train", "training", "loss")
"""Fields of an assistant's message that say whether it is trained; a message without one is."""
PROMPT_COLUMNS = ("system", "tools", "chat_template_kwargs")
"""Columns that belong to a row's conversation beside its messages."""

Message = dict[str, Any]
Messages = list[Message]


@dataclass(frozen=True)
class Given:
    """What a row gives a chat template beside its messages."""

    tools: list[dict[str, Any]] | None = None
    """JSON schemas of the tools that may be called"""
    options: Mapping[str, Any] = field(default_factory=dict)
    """variables of the template, such as `enable_thinking`"""


NOTHING = Given()


def conversation_of(row: Mapping[str, Any], messages: Any, *, training: bool) -> tuple[Messages, Given]:
    """A row's messages, checked, its `system` column before them; and its `tools` and `chat_template_kwargs`.

    Args:
        row: all columns.
        messages: as one of them holds them.
        training: whether a turn of the assistant is wanted.

    Raises:
        ValueError: a column is of another form, or two system messages differ.
    """
    checked = check_messages(messages, training=training)
    system = row.get("system")
    if system is not None and not isinstance(system, str):
        raise ValueError(f"system is {short(system)}; expected text, the system message")
    if system:
        check_unicode("system", system)
        if checked[0]["role"] != "system":
            checked = [{"role": "system", "content": system}, *checked]
        elif checked[0]["content"] != system:
            raise ValueError("the system column and the system message among messages differ; leave one of them out")
    options = row.get("chat_template_kwargs")
    if options is not None and not isinstance(options, dict):
        raise ValueError(f"chat_template_kwargs is {short(options)}; expected an object of the template's variables")
    return checked, Given(_tools(row.get("tools")), {name: value for name, value in (options or {}).items() if value is not None})


def check_messages(messages: Any, *, training: bool) -> Messages:
    """The conversation's messages, without the fields that are null; arguments of tool calls as objects.

    Raises:
        ValueError: not a list of ``{"role", "content"}`` with known roles and text, or no assistant turn to train.
    """
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"messages is {short(messages)}; expected a list of at least one message")
    checked = [_checked(number, message) for number, message in enumerate(messages, 1)]
    if training and all(message["role"] != "assistant" for message in checked):
        raise ValueError("no assistant message, so there is nothing to train; expected at least one")
    return checked


def is_trained(message: Mapping[str, Any]) -> bool:
    """Whether an assistant's message, checked before, is to be trained."""
    return all(message.get(name, True) for name in TRAINING_FIELDS)


def short(value: Any) -> str:
    """A value and its type, for messages."""
    text = repr(value)
    return f"{text[:60]}{'...' if len(text) > 60 else ''} ({type(value).__name__})"


def _checked(number: int, message: Any) -> Message:
    if not isinstance(message, dict):
        raise ValueError(f'message {number} is {short(message)}; expected {{"role": ..., "content": ...}}')
    role, content = message.get("role"), message.get("content")
    if role not in ROLES and role not in FURTHER_ROLES:
        raise ValueError(f"message {number} has role {short(role)}; expected one of {', '.join((*ROLES, *FURTHER_ROLES))}")
    kept = {name: value for name, value in message.items() if value is not None or name == "content"}
    if "tool_calls" in kept:
        kept["tool_calls"] = _tool_calls(number, role, kept["tool_calls"])
        if not kept["tool_calls"]:
            del kept["tool_calls"]
    if not isinstance(content, str) and not (content is None and "tool_calls" in kept):
        raise ValueError(f"message {number} has content {short(content)}; expected text")
    _check_training(number, role, kept)
    check_unicode(f"message {number}", kept)
    return kept


def _check_training(number: int, role: str, message: Message) -> None:
    for name in TRAINING_FIELDS:
        if name not in message:
            continue
        value = message[name]
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            raise ValueError(f"message {number} has {name} {short(value)}; expected 0 or 1, whether the turn is trained")
        if role != "assistant" and value:
            raise ValueError(f"message {number} has {name} {value}, but is the {role}'s; only the assistant's turns are trained")


def _tool_calls(number: int, role: str, calls: Any) -> list[dict[str, Any]]:
    """Arguments that are text become the object they spell, which is what templates expect."""
    if role != "assistant":
        raise ValueError(f"message {number} has tool_calls, but is the {role}'s; only the assistant calls tools")
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise ValueError(f"message {number} has tool_calls {short(calls)}; expected a list of objects")
    return [_with_arguments(number, call) for call in calls]


def _with_arguments(number: int, call: dict[str, Any]) -> dict[str, Any]:
    if isinstance(call.get("function"), dict):
        return {**call, "function": _with_arguments(number, call["function"])}
    arguments = call.get("arguments")
    if not isinstance(arguments, str):
        return {**call, "arguments": _there(arguments)} if arguments is not None else call
    try:
        parsed = read_whole_json(arguments)
    except ValueError as error:
        what = f"message {number} has tool_calls with the arguments {short(arguments)}"
        raise ValueError(f"{what}; expected JSON ({error})") from None
    return {**call, "arguments": parsed}


def _there(value: Any) -> Any:
    """Without the nulls that tables of fixed columns put where a row has nothing."""
    if isinstance(value, dict):
        return {name: _there(inner) for name, inner in value.items() if inner is not None}
    return [_there(inner) for inner in value] if isinstance(value, list) else value


def _tools(tools: Any) -> list[dict[str, Any]] | None:
    """Tools from a list of schemas, or from JSON text of it, as tables of fixed columns hold them."""
    given = tools
    try:
        parsed = read_whole_json(tools) if isinstance(tools, str) and tools.strip() else tools or None
        if isinstance(parsed, list):
            parsed = [read_whole_json(tool) if isinstance(tool, str) else tool for tool in parsed]
    except ValueError as error:
        raise ValueError(f"tools is {short(given)}; expected a list of JSON schemas ({error})") from None
    if parsed is None or parsed == "":
        return None
    if not isinstance(parsed, list) or not all(isinstance(tool, dict) for tool in parsed):
        raise ValueError(f"tools is {short(given)}; expected a list of JSON schemas")
    check_unicode("tools", parsed)
    return parsed or None


def check_unicode(name: str, value: Any) -> None:
    """What the value holds is text that a tokenizer takes.

    Raises:
        ValueError: it has a lone surrogate, which only an escape of JSON can write, or is nested too deeply.
    """
    if isinstance(value, dict) and len(value) == 2 and isinstance(value.get("content"), str):
        value = value["content"]  # role is one of ours
    try:
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    except RecursionError:
        raise ValueError(f"{name} is nested too deeply") from None
    if not text.isascii() and any("\ud800" <= char <= "\udfff" for char in text):
        raise ValueError(f"{name} has a lone surrogate in it, which is not valid Unicode; remove it")
