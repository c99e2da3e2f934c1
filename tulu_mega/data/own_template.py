"""Conversations under the chat template that a tokenizer ships: the text, and which of it is the assistant's."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from tulu_mega.data.left_out import unread
from tulu_mega.data.messages import Given, Messages, is_trained
from tulu_mega.data.template_form import ONE, Form, form_of, head_and_tail, rendered

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class Span(NamedTuple):
    """Characters ``[start, end)`` that are trained."""

    start: int
    end: int
    message: int
    """number of the message whose turn it is, counted from 0"""


@dataclass(frozen=True)
class Rendered:
    """A conversation as one text, and what of it is trained."""

    text: str
    spans: list[Span]
    rewritten: tuple[tuple[str, list[Span]], ...] = ()
    """for each turn that the template writes otherwise once more turns follow: the text that ends with this turn"""
    altered: int = 0
    """number of trained turns whose content the template changes"""
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
    return text + form.header, unread(messages, text, tokenizer, given, form)


def own_text(messages: Messages, tokenizer: PreTrainedTokenizerFast, given: Given) -> str:
    """A whole conversation as it stands.

    Raises:
        ValueError: the template refuses it, or leaves something out.
    """
    text, _ = rendered(messages, tokenizer, given)
    unread(messages, text, tokenizer, given, form_of(tokenizer, given))
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
    fields = unread(messages, whole, tokenizer, given, form)
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
    return Rendered(whole, spans, tuple(rewritten), altered, fields)


def _marks_before(before: Messages, tokenizer: PreTrainedTokenizerFast, given: Given, otherwise: int) -> int:
    """Return the number of marks before an answer, those of the earlier turns, when the answer is asked for."""
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
    """Return where an answer begins: behind the generation prompt, or else behind the text that all answers share."""
    if before and before[-1]["role"] != "assistant":  # nobody asks for another turn behind one's own
        with suppress(ValueError):  # a system message alone, say, which some refuse
            asked = rendered(before, tokenizer, given, prompt=True)[0] + form.header
            if text.startswith(asked):
                return len(asked)
    shared, _tail, _one = head_and_tail(before, {"role": "assistant", "content": ONE}, tokenizer, given)
    if text.startswith(shared):
        return len(shared)
    raise ValueError(
        f"the tokenizer's chat template changes the text before message {len(before) + 1} when it asks for that message, so the "
        "assistant's text cannot be located; mark it in the template with {% generation %} or use the template 'tulu'"
    )
