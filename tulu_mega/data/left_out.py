"""What of a conversation a tokenizer's chat template does not write, found by rendering it without."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from tulu_mega.data.messages import TRAINING_FIELDS, Given, Message, Messages
from tulu_mega.data.template_form import ONE, Form, rendered

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

MUST_BE_READ = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking")
"""Fields of a message that are part of what is said: without them it is another conversation."""
_KNOWN = ("role", "content", *TRAINING_FIELDS)


def unread(messages: Messages, text: str, tokenizer: PreTrainedTokenizerFast, given: Given, form: Form) -> frozenset[str]:
    """The fields that the template does not read, and whose texts it writes otherwise than they are.

    Raises:
        ValueError: without one of them it is another conversation; or a whole message is not there. All that is so is told.
    """
    problems = list(_tools(messages, text, tokenizer, given, form))
    found = {f"chat_template_kwargs.{name}" for name in given.options if name not in form.variables}
    said = "\n".join(message.get("content") or "" for message in messages)
    for index, message in enumerate(messages):
        found |= {name for name in message if name not in (*_KNOWN, *form.fields, *MUST_BE_READ)}
        problems += [f"{part} of message {index + 1}" for part in _parts_of_turn(messages, index, text, tokenizer, given)]
        content = (message.get("content") or "").strip()
        if message["role"] == "assistant" or not content or text.count(content) >= said.count(content):
            continue
        if _is_same(_with(messages, index, {**message, "content": ONE}), text, tokenizer, given):
            problems.append(f"message {index + 1} (the {message['role']}'s)")
        elif content not in text:
            found.add(f"content of the {message['role']}'s as it stands")
    if problems:
        raise ValueError(
            f"the tokenizer's chat template leaves out {' and '.join(problems)}; drop that from the row, or take a template that "
            "writes it"
        )
    return frozenset(found)


def _tools(messages: Messages, text: str, tokenizer: PreTrainedTokenizerFast, given: Given, form: Form) -> Iterator[str]:
    """The tools that are not written; one whose name stands in the text is."""
    tools = given.tools or []
    if not tools:
        return
    if "tools" not in form.variables or _is_same(messages, text, tokenizer, Given(None, given.options)):
        yield "tools"
        return
    for at, tool in enumerate(tools if len(tools) > 1 else ()):
        name = _function(tool).get("name")
        others = Given([*tools[:at], *tools[at + 1 :]], given.options)
        if not (isinstance(name, str) and name in text) and _is_same(messages, text, tokenizer, others):
            yield f"tool {at + 1} ({name})"


def _parts_of_turn(messages: Messages, index: int, text: str, tokenizer: PreTrainedTokenizerFast, given: Given) -> Iterator[str]:
    """What of a turn is not written where the turn is the last one; of earlier ones a template may drop the reasoning."""
    parts = list(_parts(messages[index], text))
    if not parts:
        return
    context = messages[: index + 1]
    try:
        text, _ = rendered(context, tokenizer, given)
    except ValueError:  # it may not end there
        context = messages
    for part, other in parts:
        if _is_same(_with(context, index, other), text, tokenizer, given):
            yield part


def _parts(message: Message, text: str) -> Iterator[tuple[str, Message]]:
    """What must be written of a message beside its content and does not stand in the text, and the message without it."""
    for name in MUST_BE_READ:
        value = message.get(name)
        if value and not (isinstance(value, str) and value.strip() in text):
            yield name, {key: value for key, value in message.items() if key != name}
    calls = message.get("tool_calls") or []
    for at, call in enumerate(calls):
        if len(calls) > 1:
            yield f"call {at + 1} of tool_calls", {**message, "tool_calls": [*calls[:at], *calls[at + 1 :]]}
        if _function(call).get("arguments"):
            without: Any = {**_function(call), "arguments": {}}
            without = {**call, "function": without} if "function" in call else without
            yield f"the arguments of call {at + 1}", {**message, "tool_calls": [*calls[:at], without, *calls[at + 1 :]]}


def _function(call: dict[str, Any]) -> dict[str, Any]:
    """What is called, or may be: some write it without the frame of OpenAI's form."""
    function = call.get("function")
    return function if isinstance(function, dict) else call


def _with(messages: Messages, index: int, other: Message) -> Messages:
    return [*messages[:index], other, *messages[index + 1 :]]


def _is_same(messages: Messages, text: str, tokenizer: PreTrainedTokenizerFast, given: Given) -> bool:
    """Whether another conversation has the same text."""
    with suppress(ValueError):
        return text in (rendered(messages, tokenizer, given, prompt=prompt)[0] for prompt in (False, True))
    return False
