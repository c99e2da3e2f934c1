"""Conversations as text, and which of its tokens are trained."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from tulu_mega.errors import UserError
from tulu_mega.records import IGNORE

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Messages = list[dict[str, str]]
Template = Literal["tulu", "tokenizer"]
Turns = Literal["all", "last"]

ROLES = ("system", "user", "assistant")

TULU_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    "{{ '<|assistant|>\n' }}{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    "{% if not loop.last %}{{ '\n' }}{% endif %}"
    "{% elif message['role'] in ['system', 'user'] %}"
    "{{ '<|' + message['role'] + '|>\n' + message['content'] + '\n' }}"
    "{% else %}{{ raise_exception('unknown role ' + message['role']) }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
"""What :func:`render_tulu` and :func:`tulu_prompt` write, as the Jinja template that exported models ship."""

_GENERATION_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True)
class Rendered:
    """A conversation as one text, and the character ranges ``[start, end)`` of it that are trained."""

    text: str
    spans: list[tuple[int, int]]


def check_messages(messages: Any, *, training: bool) -> Messages:
    """The conversation with nothing but role and content in each message.

    Raises:
        ValueError: not a list of ``{"role", "content"}`` with known roles and text, or no assistant turn to train.
    """
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"messages is {_short(messages)}; expected a list of at least one message")
    checked = []
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict):
            raise ValueError(f'message {number} is {_short(message)}; expected {{"role": ..., "content": ...}}')
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise ValueError(f"message {number} has role {_short(role)}; expected one of {', '.join(ROLES)}")
        if not isinstance(content, str):
            raise ValueError(f"message {number} has content {_short(content)}; expected text")
        if not content.isascii() and any("\ud800" <= char <= "\udfff" for char in content):
            raise ValueError(f"message {number} has a lone surrogate in its content, which is not valid Unicode; remove it")
        checked.append({"role": role, "content": content})
    if training and all(message["role"] != "assistant" for message in checked):
        raise ValueError("no assistant message, so there is nothing to train; expected at least one")
    return checked


def render_tulu(messages: Messages, eos: str) -> Rendered:
    """Tulu's template; every assistant turn is trained, its end-of-sequence token included.

    The generation prompt and the newline that follows a turn which is not the last are not trained.
    """
    text, spans = "", []
    for number, message in enumerate(messages, 1):
        text += f"<|{message['role']}|>\n"
        if message["role"] == "assistant":
            start = len(text)
            text += message["content"] + eos
            spans.append((start, len(text)))
            text += "\n" if number < len(messages) else ""
        else:
            text += message["content"] + "\n"
    return Rendered(text, spans)


def tulu_prompt(messages: Messages, eos: str) -> str:
    """Tulu's template up to where the assistant's next turn begins."""
    return render_tulu(messages, eos).text + "<|assistant|>\n"


def template_of(tokenizer: PreTrainedTokenizerFast, asked: Literal["auto"] | Template) -> Template:
    """The template that a model is asked under: the one it ships is the one it was trained with; base models ship none."""
    if asked == "auto":
        return "tokenizer" if tokenizer.chat_template else "tulu"
    return asked


def encode(
    messages: Any, tokenizer: PreTrainedTokenizerFast, template: Template, max_length: int | None, turns: Turns = "all"
) -> tuple[list[int], list[int]]:
    """Tokenises a conversation for training.

    The whole text is tokenised at once. A token is trained when its first character lies in a trained span, so one that
    straddles the beginning of an assistant's turn is not.

    Args:
        messages: list of ``{"role": ..., "content": ...}``.
        tokenizer: a fast tokenizer; its eos token ends an assistant's turn.
        template: Tulu's, or the one the tokenizer ships.
        max_length: tokens to keep, the rest is cut off on the right; None keeps all.
        turns: of the assistant that are trained: all of them, or the last alone.

    Returns:
        ``input_ids`` and ``labels`` of equal length; labels are not shifted, IGNORE where not trained.

    Raises:
        ValueError: the conversation is malformed, or the tokenizer's template refuses it.
        UserError: the tokenizer is not fast, or its template does not tell the assistant's text.
    """
    if not tokenizer.is_fast:
        raise UserError("tokens cannot be located in the text without a fast tokenizer; give one with tokenizer.json")
    messages = check_messages(messages, training=True)
    rendered = render_tulu(messages, tokenizer.eos_token) if template == "tulu" else _render_own(messages, tokenizer)
    encoding = tokenizer(rendered.text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids = encoding["input_ids"][:max_length]
    labels = [IGNORE] * len(ids)
    spans = iter(rendered.spans if turns == "all" else rendered.spans[-1:])
    begin, end = next(spans)
    for position, (start, _) in enumerate(encoding["offset_mapping"][: len(ids)]):
        while start >= end:
            begin, end = next(spans, (len(rendered.text) + 1, len(rendered.text) + 1))
        if start >= begin:
            labels[position] = ids[position]
    return ids, labels


def prompt_ids(messages: Any, tokenizer: PreTrainedTokenizerFast, template: Template) -> list[int]:
    """Tokens of a conversation up to where the assistant's next turn begins.

    Raises:
        ValueError: the conversation is malformed, or the tokenizer's template refuses it.
    """
    messages = check_messages(messages, training=False)
    if template == "tulu":
        text = tulu_prompt(messages, tokenizer.eos_token)
    else:
        text = _apply_own(messages, tokenizer, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def conversation_ids(messages: Any, tokenizer: PreTrainedTokenizerFast, template: Template) -> list[int]:
    """Tokens of a whole conversation as it stands, whoever speaks last.

    Raises:
        ValueError: the conversation is malformed, or the tokenizer's template refuses it.
    """
    messages = check_messages(messages, training=False)
    text = render_tulu(messages, tokenizer.eos_token).text if template == "tulu" else _apply_own(messages, tokenizer)
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def _render_own(messages: Messages, tokenizer: PreTrainedTokenizerFast) -> Rendered:
    if _GENERATION_MARK.search(tokenizer.get_chat_template()):
        return _render_marked(messages, tokenizer)
    return _render_by_prefixes(messages, tokenizer)


def _render_marked(messages: Messages, tokenizer: PreTrainedTokenizerFast) -> Rendered:
    """Spans as the template marks them.

    ``apply_chat_template`` would give a mask of tokens, but it locates the last token by its first character only and so drops
    the rest of a character that takes several tokens.
    """
    from transformers.utils.chat_template_utils import render_jinja_template

    with _refusals():
        texts, spans = render_jinja_template(
            [messages],
            chat_template=tokenizer.get_chat_template(),
            return_assistant_tokens_mask=True,
            **tokenizer.special_tokens_map,
        )
    if not spans[0]:
        raise UserError("the tokenizer's chat template marks no text as the assistant's; use the template 'tulu'")
    return Rendered(texts[0], [(start, end) for start, end in spans[0]])


def _render_by_prefixes(messages: Messages, tokenizer: PreTrainedTokenizerFast) -> Rendered:
    """Spans from rendering the conversation up to each assistant's turn, without and with that turn."""
    whole = _apply_own(messages, tokenizer)
    spans = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        if index == 0:
            raise ValueError(
                "the first message is the assistant's, which this chat template does not mark; put a user message first"
            )
        before = _apply_own(messages[:index], tokenizer, add_generation_prompt=True)
        after = _apply_own(messages[: index + 1], tokenizer)
        if not (after.startswith(before) and whole.startswith(after)):
            raise UserError(
                f"the tokenizer's chat template renders the messages up to {index + 1} otherwise than inside the whole, "
                "so the assistant's text cannot be told; mark it there with {% generation %} or use the template 'tulu'"
            )
        end = len(after)
        eos = tokenizer.eos_token
        if after.rstrip().endswith(eos):  # what a template puts after its end of turn is not the assistant's
            end = after.rindex(eos) + len(eos)
        spans.append((len(before), end))
    return Rendered(whole, spans)


def _apply_own(messages: Messages, tokenizer: PreTrainedTokenizerFast, add_generation_prompt: bool = False) -> str:
    with _refusals():
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)


@contextmanager
def _refusals() -> Iterator[None]:
    """Turns what a Jinja template raises (roles that must alternate...) into a ValueError about the row."""
    from jinja2 import TemplateError

    try:
        yield
    except TemplateError as error:
        raise ValueError(f"the tokenizer's chat template refuses this conversation: {error}") from None


def _short(value: Any) -> str:
    text = repr(value)
    return f"{text[:60]}{'...' if len(text) > 60 else ''} ({type(value).__name__})"
