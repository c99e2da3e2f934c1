"""Conversations under the chat template that a tokenizer ships: the text, and which of it is the assistant's."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from tulu_mega.data.messages import TRAINING_FIELDS, Given, Message, Messages, is_trained
from tulu_mega.data.template_form import ONE, Form, form_of, head_and_tail, rendered

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

MUST_BE_READ = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking")
"""Fields of a message that are part of what is said: without them it is another conversation."""
_KNOWN = ("role", "content", *TRAINING_FIELDS)


class Span(NamedTuple):
    """Characters ``[start, end)`` that are trained."""

    start: int
    end: int
    message: int
    """whose turn it is, counted from 0"""


@dataclass(frozen=True)
class Rendered:
    """A conversation as one text, and what of it is trained."""

    text: str
    spans: list[Span]
    rewritten: tuple[tuple[str, list[Span]], ...] = ()
    """turns to be trained that stand in the text otherwise than where they are the last: the text that ends with each"""
    altered: int = 0
    """turns trained whose content does not stand in the text as the row has it"""
    unread: frozenset[str] = frozenset()
    """fields that the template does not read"""


def own_prompt(messages: Messages, tokenizer: PreTrainedTokenizerFast, given: Given) -> tuple[str, frozenset[str]]:
    """A conversation up to where the assistant's next turn begins; with its header, also where the template writes none. And
    the fields that the template does not read.

    Raises:
        ValueError: the template refuses it, or leaves something out.
    """
    text, _ = rendered(messages, tokenizer, given, prompt=True)
    form = form_of(tokenizer, given)
    return text + form.header, _unread(messages, text, tokenizer, given, form)


def own_text(messages: Messages, tokenizer: PreTrainedTokenizerFast, given: Given) -> str:
    """A whole conversation as it stands.

    Raises:
        ValueError: the template refuses it, or leaves something out.
    """
    text, _ = rendered(messages, tokenizer, given)
    _unread(messages, text, tokenizer, given, form_of(tokenizer, given))
    return text


def render_own(messages: Messages, tokenizer: PreTrainedTokenizerFast, given: Given) -> Rendered:
    """A conversation for training.

    A turn is trained where the text up to its end is what the model would have been asked, and would have answered then: of a
    template that writes earlier turns otherwise (without their reasoning, say) those turns are not.

    Raises:
        ValueError: the template refuses it, leaves something out, or does not tell the assistant's text.
    """
    form = form_of(tokenizer, given)
    whole, marks = rendered(messages, tokenizer, given, marks=form.marked)
    unread = _unread(messages, whole, tokenizer, given, form)
    spans: list[Span] = []
    rewritten, altered, seen = [], 0, 0
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        text, marked = whole, marks
        if index < len(messages) - 1:
            text, marked = rendered(messages[: index + 1], tokenizer, given, marks=form.marked)
        if form.marked:
            seen = _marks_before(messages[:index], tokenizer, given, seen)
            turn = marked[seen:] or marked[-1:]
            seen = len(marked)
        else:
            turn = [_turn(messages, index, text, tokenizer, given, form)]
        if not is_trained(message) or not turn:
            continue
        end = turn[-1][1]
        if text[:end] != whole[:end] or not (set(turn) <= set(marks) if form.marked else True):
            rewritten.append((text, [Span(start, end, index) for start, end in turn]))
            continue
        spans += [Span(start, end, index) for start, end in turn]
        altered += (message.get("content") or "").strip() not in whole[turn[0][0] : end]
    if form.marked and not marks:
        raise ValueError("the tokenizer's chat template marks no text as the assistant's; use the template 'tulu'")
    return Rendered(whole, spans, tuple(rewritten), altered, unread)


def _marks_before(before: Messages, tokenizer: PreTrainedTokenizerFast, given: Given, otherwise: int) -> int:
    """How many marks stand ahead of an answer: earlier turns as they are written when it is asked for."""
    if before:
        with suppress(ValueError):  # a system message alone, say, which some refuse
            return len(rendered(before, tokenizer, given, prompt=True, marks=True)[1])
    return otherwise


def _turn(
    messages: Messages, index: int, text: str, tokenizer: PreTrainedTokenizerFast, given: Given, form: Form
) -> tuple[int, int]:
    """Where a turn stands in a text that ends with it: from behind what asks for it to the end of the turn.

    Raises:
        ValueError: it cannot be told.
    """
    begin = _beginning(messages[:index], text, tokenizer, given, form)
    end = len(text) - len(form.behind) if text.endswith(form.behind) else len(text.rstrip())
    return begin, max(begin, end)


def _beginning(before: Messages, text: str, tokenizer: PreTrainedTokenizerFast, given: Given, form: Form) -> int:
    """Where an answer begins: behind what asks for it, or else behind what it shares with other answers."""
    if before and before[-1]["role"] != "assistant":  # nobody asks for another turn behind one's own
        with suppress(ValueError):  # a system message alone, say, which some refuse
            asked = rendered(before, tokenizer, given, prompt=True)[0] + form.header
            if text.startswith(asked):
                return len(asked)
    shared, _tail, _one = head_and_tail(before, {"role": "assistant", "content": ONE}, tokenizer, given)
    if text.startswith(shared):
        return len(shared)
    raise ValueError(
        f"the tokenizer's chat template writes what comes before message {len(before) + 1} otherwise when it asks for it, so the "
        "assistant's text cannot be told; mark it there with {% generation %} or use the template 'tulu'"
    )


def _unread(messages: Messages, text: str, tokenizer: PreTrainedTokenizerFast, given: Given, form: Form) -> frozenset[str]:
    """The fields that the template does not read.

    Raises:
        ValueError: without one of them it is another conversation; or a whole message is not there. All that is so is told.
    """
    problems = ["tools"] if given.tools and "tools" not in form.variables else []
    found = {f"chat_template_kwargs.{name}" for name in given.options if name not in form.variables}
    said = "\n".join(message.get("content") or "" for message in messages)
    for index, message in enumerate(messages):
        for name in message:
            if name in _KNOWN or name in form.fields:
                continue
            if name not in MUST_BE_READ:
                found.add(name)
            elif message[name] and not _matters(messages, index, _without(message, name), text, tokenizer, given):
                problems.append(f"{name} of message {index + 1}")
        content = (message.get("content") or "").strip()
        if message["role"] == "assistant" or not content or text.count(content) >= said.count(content):
            continue
        if not _matters(messages, index, {**message, "content": ONE}, text, tokenizer, given):
            problems.append(f"message {index + 1} (the {message['role']}'s)")
    if problems:
        raise ValueError(
            f"the tokenizer's chat template leaves out {' and '.join(problems)}; drop that from the row, or take a template that "
            "writes it"
        )
    return frozenset(found)


def _matters(messages: Messages, index: int, other: Message, text: str, tokenizer: PreTrainedTokenizerFast, given: Given) -> bool:
    """Whether the text is another one with another message in the place of one of them."""
    changed = [*messages[:index], other, *messages[index + 1 :]]
    with suppress(ValueError):
        return text not in (rendered(changed, tokenizer, given, prompt=prompt)[0] for prompt in (False, True))
    return True


def _without(message: Message, name: str) -> Message:
    return {key: value for key, value in message.items() if key != name}
