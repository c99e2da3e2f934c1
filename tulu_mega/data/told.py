"""Lines for people: what of a data set's rows is changed or not used, and with which tokens turns end."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from tulu_mega.data.chat import Template
from tulu_mega.data.messages import NOTHING
from tulu_mega.data.stops import own_tokens
from tulu_mega.data.template_form import Form, form_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_NAMES = 10
"""Columns or fields that a line names."""


def end_tokens(ends: Counter[int], tokenizer: PreTrainedTokenizerFast | None) -> list[int]:
    """Return the tokens, out of those that end turns, that belong to the tokenizer (special or added ones) and not to text."""
    if tokenizer is None:
        return []
    own = own_tokens(tokenizer)
    return [token for token, _ in ends.most_common() if token in own]


def lines(
    told: Counter[str], ends: Counter[int], tokenizer: PreTrainedTokenizerFast | None, template: Template, rewritten: str
) -> list[str]:
    """
    Args:
        told: how often what happened: ``form NAME`` (rows of another form than messages), ``column NAME`` and ``field NAME``
            (rows in which nobody looks at them), ``rewritten`` (turns that the template writes otherwise once more follows),
            ``rewritten rows``, ``altered`` (turns whose text it changes), ``padding`` (sequences).
        ends: how many trained turns end with which token.
        template: of the conversations.
        rewritten: `data.rewritten`.
    """
    found = [
        _names("rows of another form than messages, read by its columns", told, "form "),
        _names("columns that are not used", told, "column "),
        _names("fields of messages that the chat template does not use", told, "field "),
    ]
    if turns := told["rewritten"]:
        becomes = (
            "are rows of their own"
            if rewritten == "split"
            else 'are not trained; with data.rewritten = "split" each is a row of its own'
        )
        found.append(
            f"{turns:,} turns of the assistant in {told['rewritten rows']:,} rows, which the chat template writes otherwise once "
            f"more follows (without reasoning, say), {becomes}"
        )
    if turns := told["altered"]:
        found.append(
            f"{turns:,} turns of the assistant are not trained as the rows have them: the chat template changes their text"
        )
    if sequences := told["padding"]:
        found.append(f"padding is left out of {sequences:,} sequences, by attention_mask")
    if tokenizer is not None and ends and template == "tokenizer":
        found += _ends(ends, tokenizer, form_of(tokenizer, NOTHING))
    elif tokenizer is not None and ends.total() > ends[tokenizer.eos_token_id]:
        found.append(
            f"warning: turns end in {tokenizer.eos_token!r}, which the tokenizer cuts into tokens of text: a model that is "
            "trained so does not stop; see split_special_tokens in tokenizer_config.json"
        )
    return [line for line in found if line]


def form_lines(form: Form) -> list[str]:
    """Describe what is unusual about a template, for people who also use the model with other programs."""
    found = [form.day] if form.day else []
    if form.header:
        found.append(
            f"the chat template does not write {form.header!r} when an answer is asked for; prompts of eval, generate and grpo "
            "have it, those of other programs have not"
        )
    if form.header_behind:
        found.append("the chat template writes the header of a further answer behind the last one; this header is not trained")
    return found


def _ends(ends: Counter[int], tokenizer: PreTrainedTokenizerFast, form: Form) -> list[str]:
    found, turns = form_lines(form), sum(ends.values())
    stops = end_tokens(ends, tokenizer)
    ended, ending, eos = sum(ends[token] for token in stops), form.ending.strip(), tokenizer.eos_token
    if not form.ending_trained and ended < turns:
        found.append(
            f"warning: no end of turn is trained: {{% generation %}} of the chat template leaves {ending!r} out, and a model "
            "that never learns it does not stop; end the mark behind it"
        )
    elif not ending:
        found.append(
            "warning: no end of turn is trained: the chat template writes none, and a model that never learns it does not stop"
        )
    elif not ended:
        tokens = len(tokenizer(ending, add_special_tokens=False)["input_ids"])
        found.append(
            f"warning: turns end in {ending!r}, which is not the tokenizer's eos token {eos!r} but {tokens} tokens of text: "
            "generation does not stop there; make it a token of the tokenizer, or end turns with the eos token"
        )
    elif ended < turns:
        found.append(f"warning: {turns - ended:,} of {turns:,} turns are trained without a token that ends them")
    others = [tokenizer.convert_ids_to_tokens(token) for token in stops if token != tokenizer.eos_token_id]
    if others:
        found.append(
            f"turns end in {' or '.join(map(repr, others))}, not in the tokenizer's eos token {eos!r}: generation_config.json of "
            "the exported model names it, so that generation stops there"
        )
    return found


def _names(what: str, told: Counter[str], prefix: str) -> str:
    counts = [(name.removeprefix(prefix), count) for name, count in told.most_common() if name.startswith(prefix)]
    if not counts:
        return ""
    shown = ", ".join(f"{name if name.isprintable() else ascii(name)} ({count:,} rows)" for name, count in counts[:_NAMES])
    return f"{what}: {shown}{f' and {len(counts) - _NAMES} more' if len(counts) > _NAMES else ''}"
