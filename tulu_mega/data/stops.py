"""The tokens at which generation stops, as the model was trained."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tulu_mega.bridge.files.companions import CONFIG, GENERATION
from tulu_mega.data.chat import Template
from tulu_mega.data.messages import NOTHING
from tulu_mega.data.template_form import form_of
from tulu_mega.outside.json_input import read_json_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def stop_ids(tokenizer: PreTrainedTokenizerFast, template: Template, model: str | None) -> tuple[int, ...]:
    """The tokens that end an answer: the tokenizer's eos, what ends a turn under the template, and what the model names.

    Args:
        model: directory or hub name, whose generation_config.json (or config.json, where it has none) names them as transformers
            and vLLM read it; None where its numbers are another tokenizer's.
    """
    found = [tokenizer.eos_token_id]
    if template == "tokenizer":
        ending = tokenizer(form_of(tokenizer, NOTHING).ending.strip(), add_special_tokens=False)["input_ids"]
        found += ending[-1:] if set(ending[-1:]) <= own_tokens(tokenizer) else []
    return tuple(dict.fromkeys([*found, *(_named(model) if model else ())]))


def own_tokens(tokenizer: PreTrainedTokenizerFast) -> set[int]:
    """Tokens that text is not cut into: special ones, and others that were added to the vocabulary."""
    return {tokenizer.eos_token_id, *tokenizer.get_added_vocab().values()}


def answer_text(tokens: Sequence[int], finish_reason: str, tokenizer: PreTrainedTokenizerFast) -> str:
    """An answer as text, without the token that ended it, be it a special one or not, and without special ones."""
    if finish_reason == "stop" and tokens and tokens[-1] in own_tokens(tokenizer):
        tokens = tokens[:-1]
    return tokenizer.decode(tokens, skip_special_tokens=True)


def _named(model: str) -> list[int]:
    path = Path(model).expanduser()
    for name in (GENERATION, CONFIG):
        file = path / name
        try:
            content: Any = read_json_text(file.read_text(encoding="utf-8")) if path.is_dir() else _of_hub(model, name)
            ends = content.get("eos_token_id")
        except (OSError, ValueError, AttributeError):  # not there; what else is wrong with it is seen when the model is loaded
            continue
        return [end for end in (ends if isinstance(ends, list) else [ends]) if type(end) is int and end >= 0]
    return []


def _of_hub(model: str, name: str) -> Any:
    from huggingface_hub import hf_hub_download

    return read_json_text(Path(hf_hub_download(model, name)).read_text(encoding="utf-8"))
