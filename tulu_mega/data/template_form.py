"""What a tokenizer's chat template does, found by rendering probes: where an answer begins, how it ends, what it reads."""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from tulu_mega.data import limits, template_day
from tulu_mega.data.limited_work import names, render, told
from tulu_mega.data.messages import TRAINING_FIELDS, Given, Message, Messages
from tulu_mega.data.tulu_template import TULU_CHAT_TEMPLATE
from tulu_mega.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

ONE, OTHER = "xylem", "quartz"
"""Texts of a probe. They differ in their first letters and in their last, so that what two renderings share ends at them."""
_ASK = {"role": "user", "content": "probe"}
_OF_THE_RENDERER = {
    "conversations", "messages", "tools", "documents", "chat_template", "return_assistant_tokens_mask", "continue_final_message",
    "add_generation_prompt", template_day.CLOCK,
}  # fmt: skip
"""Arguments of transformers' own function, which a row's variables must not become."""
_OWN = (TULU_CHAT_TEMPLATE,)
"""Templates that are ours: they are rendered in this process, without limits."""
_GENERATION_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True)
class Form:
    """What probes found out about a template."""

    marked: bool
    """``{% generation %}`` says what is the assistant's"""
    header: str
    """what begins the assistant's turn and is not written when a generation prompt is asked for; mostly empty"""
    header_behind: bool
    """the beginning of another turn of the assistant is written behind its last one, asked for or not"""
    ending: str
    """what ends the assistant's turn, without white space behind it; empty where nothing does"""
    behind: str
    """what comes behind that at the end of a conversation"""
    ending_trained: bool
    """marks, where there are any, hold the end of the turn too"""
    variables: frozenset[str]
    """variables in the template's code"""
    fields: frozenset[str]
    """attributes and texts in it, such as `m.role` and `m['role']`"""
    day: str | None = None
    """a line about the date that it writes; None where it reads no clock"""


def rendered(
    messages: Messages, tokenizer: PreTrainedTokenizerFast, given: Given, prompt: bool = False, marks: bool = False
) -> tuple[str, list[tuple[int, int]]]:
    """A conversation as the tokenizer's template writes it, and the character ranges that it marks if they are asked for.

    Raises:
        ValueError: the template refuses or cannot do it, whatever it is that it raises.
        UserError: it takes too long, or too much memory.
    """
    if taken := sorted(given.options.keys() & _OF_THE_RENDERER):
        raise ValueError(f"chat_template_kwargs has {', '.join(taken)}, which is no variable of a template; leave it out")
    arguments = {
        **tokenizer.special_tokens_map,
        **given.options,
        "messages": [{name: value for name, value in message.items() if name not in TRAINING_FIELDS} for message in messages],
        "tools": given.tools,
        "add_generation_prompt": prompt,
    }
    try:
        template = tokenizer.get_chat_template(tools=given.tools)
        return (render if template in _OWN else limits.rendered)(template, arguments, marks)
    except UserError:
        raise
    except Exception as error:  # a template is a program: what it does not expect in a row raises anything
        what = str(error) if isinstance(error, limits.Refused) else told(error)
        raise ValueError(f"the tokenizer's chat template refuses this conversation: {' '.join(what.split())}") from None


_known: WeakKeyDictionary[PreTrainedTokenizerFast, dict[str, Form]] = WeakKeyDictionary()


def form_of(tokenizer: PreTrainedTokenizerFast, given: Given) -> Form:
    """What is known of the template that the tokenizer has for such a conversation; found out once."""
    template = tokenizer.get_chat_template(tools=given.tools)
    forms = _known.setdefault(tokenizer, {})
    if template not in forms:
        forms[template] = _found(template, tokenizer, given)
    return forms[template]


def head_and_tail(before: Messages, message: Message, tokenizer: PreTrainedTokenizerFast, given: Given) -> tuple[str, str, str]:
    """What a template writes before a message's content and behind it, and the whole with the content :data:`ONE`.

    Raises:
        ValueError: the template refuses such a conversation.
    """
    one, other = (rendered([*before, {"role": message["role"], "content": text}], tokenizer, given)[0] for text in (ONE, OTHER))
    return _shared(one, other), _shared(one[::-1], other[::-1])[::-1], one


def _shared(one: str, other: str) -> str:
    """Return the longest text with which both begin."""
    return "".join(char for char, _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def _found(template: str, tokenizer: PreTrainedTokenizerFast, given: Given) -> Form:
    marked = bool(_GENERATION_MARK.search(template))
    variables, fields = names(template) if template in _OWN else limits.names(template)
    answer = {"role": "assistant", "content": ""}
    plain, day = Given(given.tools), template_day.told(template)
    try:
        unasked, asked = (rendered([_ASK], tokenizer, plain, prompt=prompt)[0] for prompt in (False, True))
        head, tail, whole = head_and_tail([_ASK], answer, tokenizer, plain)
    except ValueError:  # it takes other conversations only: rows will tell
        return Form(marked, "", False, tokenizer.eos_token, "", True, variables, fields, day)
    # white space alone is no header: after `[/INST]` the model writes its blank itself
    missing = head.removeprefix(unasked) if asked == unasked and head.startswith(unasked) else ""
    ending = _ending(_without_header(tail, answer, tokenizer, plain) if asked == unasked else tail, tokenizer)
    behind = tail[len(ending) :]
    trained = True
    if marked:
        spans = rendered([_ASK, {**answer, "content": ONE}], tokenizer, plain, marks=True)[1]
        trained = bool(spans) and spans[-1][1] >= len(whole) - len(behind)
    header_behind = asked == unasked and bool(behind.strip())
    return Form(marked, missing if missing.strip() else "", header_behind, ending, behind, trained, variables, fields, day)


def _without_header(tail: str, answer: Message, tokenizer: PreTrainedTokenizerFast, given: Given) -> str:
    """Return the text behind an answer, without the header of a further turn that some templates write there unasked."""
    try:
        header, _tail, _whole = head_and_tail([], answer, tokenizer, given)
    except ValueError:
        return tail
    return tail.removesuffix(header) if tail.endswith(header) else tail.removesuffix(header.rstrip())


def _ending(tail: str, tokenizer: PreTrainedTokenizerFast) -> str:
    """Return the end of a turn out of the text behind its content: up to the first special token, or else the first word."""
    tokens = {*tokenizer.get_added_vocab(), tokenizer.eos_token} - {""}
    ends = [(tail.find(token), -len(token)) for token in tokens if token in tail]
    if ends:
        start, length = min(ends)
        return tail[: start - length]
    word = re.match(r"\s*\S+", tail)
    return word[0] if word else ""
