"""Conversations as tokens, and which of them are trained: one rule for all commands."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from tulu_mega.data.left_out import MUST_BE_READ
from tulu_mega.data.messages import NOTHING, ROLES, TRAINING_FIELDS, Given, Messages, check_messages, is_trained
from tulu_mega.data.own_template import Rendered, Span, own_prompt, own_text, render_own
from tulu_mega.errors import UserError
from tulu_mega.records import IGNORE

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Template = Literal["tulu", "tokenizer"]
Turns = Literal["all", "last"]


class Sequence(NamedTuple):
    """A conversation as tokens."""

    ids: list[int]
    labels: list[int]
    """labels, not shifted; IGNORE where a token is not trained"""
    ends: tuple[tuple[int, int], ...]
    """for each trained turn: its last token, and the number of the conversation's tokens up to and with it"""


class Encodings(NamedTuple):
    """The sequences as which a conversation is trained."""

    whole: Sequence
    rewritten: tuple[Sequence, ...]
    """further sequences, each ending with a turn that the template writes otherwise once more turns follow: the whole
    conversation does not train such a turn"""
    altered: int
    """number of turns whose text the template changes"""
    unread: frozenset[str]
    """fields of messages that the template does not read"""


def render_tulu(messages: Messages, eos: str, given: Given = NOTHING) -> Rendered:
    """Tulu's template; every assistant turn is trained, its end-of-sequence token included.

    The generation prompt and the newline that follows a turn which is not the last are not trained.

    Raises:
        ValueError: a message is of a role, or has a field that says something, for which the template has no form; or there are
            tools.
    """
    text, spans, unread = "", [], {f"chat_template_kwargs.{name}" for name in given.options}
    if given.tools:
        raise ValueError("tools are given, which Tulu's template does not write; take the tokenizer's, or leave them out")
    for index, message in enumerate(messages):
        number, role = index + 1, message["role"]
        if role not in ROLES:
            raise ValueError(f"message {number} has role {role!r}; Tulu's template knows {', '.join(ROLES)} alone")
        if said := next((name for name in MUST_BE_READ if message.get(name)), None):
            raise ValueError(f"message {number} has {said}, which Tulu's template does not write; take the tokenizer's template")
        unread |= message.keys() - {"role", "content", *TRAINING_FIELDS, *MUST_BE_READ}
        text += f"<|{role}|>\n"
        if role == "assistant":
            start = len(text)
            text += message["content"] + eos
            spans += [Span(start, len(text), index)] if is_trained(message) else []
            text += "\n" if number < len(messages) else ""
        else:
            text += message["content"] + "\n"
    return Rendered(text, spans, unread=frozenset(unread))


def tulu_prompt(messages: Messages, eos: str, given: Given = NOTHING) -> str:
    """Tulu's template up to where the assistant's next turn begins."""
    return render_tulu(messages, eos, given).text + "<|assistant|>\n"


def template_of(tokenizer: PreTrainedTokenizerFast | None, asked: Literal["auto"] | Template) -> Template:
    """The template of a model: the one it ships is the one it was trained with; base models may ship none."""
    if asked == "auto":
        return "tokenizer" if tokenizer is not None and tokenizer.chat_template else "tulu"
    return asked


def encode(
    messages: Any,
    tokenizer: PreTrainedTokenizerFast,
    template: Template,
    max_length: int | None,
    turns: Turns = "all",
    given: Given = NOTHING,
) -> tuple[list[int], list[int]]:
    """Return ``input_ids`` and ``labels`` of a whole conversation, cut to `max_length` tokens."""
    whole = encodings(check_messages(messages, training=True), tokenizer, template, turns, given).whole
    return whole.ids[:max_length], whole.labels[:max_length]


def encodings(
    messages: Messages, tokenizer: PreTrainedTokenizerFast, template: Template, turns: Turns = "all", given: Given = NOTHING
) -> Encodings:
    """Tokenises a conversation for training.

    The whole text is tokenised at once. A token is trained when its first character lies in a trained span, so one that
    straddles the beginning of an assistant's turn is not.

    Args:
        messages: checked, with a turn of the assistant among them.
        tokenizer: a fast tokenizer; under Tulu's template its eos token ends an assistant's turn.
        template: Tulu's, or the one the tokenizer ships.
        turns: which of the assistant's turns are trained: all, or the last alone.
        given: what the row gives the template beside the messages.

    Raises:
        ValueError: the template refuses the conversation, or leaves something of it out.
        UserError: the tokenizer is not fast.
    """
    if not tokenizer.is_fast:
        raise UserError("tokens cannot be located in the text without a fast tokenizer; give one with tokenizer.json")

    if template == "tulu":
        whole = render_tulu(messages, tokenizer.eos_token, given)
    else:
        whole = render_own(messages, tokenizer, given)
    last = max(index for index, message in enumerate(messages) if message["role"] == "assistant")
    kept = range(len(messages)) if turns == "all" else (last,)
    rewritten = [_sequence(text, spans, tokenizer) for text, spans in whole.rewritten if spans[0].message in kept]
    spans = [span for span in whole.spans if span.message in kept]
    return Encodings(_sequence(whole.text, spans, tokenizer), tuple(rewritten), whole.altered, whole.unread)


def prompt_ids(messages: Any, tokenizer: PreTrainedTokenizerFast, template: Template, given: Given = NOTHING) -> list[int]:
    """Tokens of a conversation up to where the assistant's next turn begins. Raises as `prompt_of`."""
    return prompt_of(messages, tokenizer, template, given)[0]


def prompt_of(
    messages: Any, tokenizer: PreTrainedTokenizerFast, template: Template, given: Given = NOTHING
) -> tuple[list[int], frozenset[str]]:
    """Tokens of a conversation up to where the assistant's next turn begins, and the fields that the template does not read.

    Raises:
        ValueError: the conversation is malformed, or the template refuses it or leaves something of it out.
    """
    messages = check_messages(messages, training=False)
    if template == "tulu":
        unread, text = render_tulu(messages, tokenizer.eos_token, given).unread, tulu_prompt(messages, tokenizer.eos_token, given)
    else:
        text, unread = own_prompt(messages, tokenizer, given)
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], unread


def conversation_ids(messages: Any, tokenizer: PreTrainedTokenizerFast, template: Template, given: Given = NOTHING) -> list[int]:
    """Tokens of a whole conversation as it stands, whoever speaks last.

    Raises:
        ValueError: the conversation is malformed, or the template refuses it or leaves something of it out.
    """
    messages = check_messages(messages, training=False)
    if template == "tulu":
        text = render_tulu(messages, tokenizer.eos_token, given).text
    else:
        text = own_text(messages, tokenizer, given)
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def _sequence(text: str, spans: list[Span], tokenizer: PreTrainedTokenizerFast) -> Sequence:
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids = encoding["input_ids"]
    labels, ends, at = [IGNORE] * len(ids), {}, 0
    for position, (start, _) in enumerate(encoding["offset_mapping"]):
        while at < len(spans) and start >= spans[at].end:
            at += 1
        if at < len(spans) and start >= spans[at].start:
            labels[position] = ids[position]
            ends[spans[at].message] = (ids[position], position + 1)
    return Sequence(ids, labels, tuple(ends.values()))
