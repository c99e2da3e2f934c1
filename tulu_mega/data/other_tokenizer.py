"""The tokenizer of a model that was trained with another one than its own, as it goes with the exported model."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tulu_mega.bridge.files.companions import CONFIG, TOKENIZER, OtherTokenizer, as_json, found
from tulu_mega.bridge.files.config_json import read_generation
from tulu_mega.bridge.rules import Config
from tulu_mega.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def other_tokenizer(
    name: str, model: Path, config: Config, reward: bool = False, trust_remote_code: bool = False
) -> OtherTokenizer:
    """What goes with a model that was trained with another tokenizer than its own.

    The tokenizer's files as they are, its chat template among them. Of config.json and generation_config.json the special
    tokens. Generation ends at the tokenizer's eos, and at what the model named before where that is the same token in both,
    such as an end of turn. Padding and bos are the tokenizer's; where it has none, the model's if that is the same token in
    both, else none.

    Args:
        name: directory or hub name of the tokenizer.
        model: directory of the model.
        config: its config.json.
        reward: whether a reward model is made of it, which has no padding token that ends texts too (`families.reward`).
        trust_remote_code: let transformers run Python code that comes with the tokenizer, which then goes with the model too.

    Raises:
        UserError: there is none, its eos token is not in the model's vocabulary, or beside the model's config.json transformers
            makes another tokenizer of its files.
    """
    from tulu_mega.data.tokenizer import load_tokenizer

    tokenizer, vocabulary = load_tokenizer(str(model), name, trust_remote_code=trust_remote_code), config["vocab_size"]
    if tokenizer.eos_token_id >= vocabulary:
        raise UserError(
            f"data.tokenizer = {name!r}: its eos token {tokenizer.eos_token!r} is number {tokenizer.eos_token_id}, but the "
            f"model's vocabulary has {vocabulary} entries; give a tokenizer that was made for this model"
        )
    files = _files_of(name, (*TOKENIZER, "*.py") if trust_remote_code else TOKENIZER)
    _check_beside(name, tokenizer, files, config, trust_remote_code)
    try:
        own = load_tokenizer(str(model), trust_remote_code=trust_remote_code)
    except UserError:  # the model needs none of its own
        own = None
    generation = read_generation(model)
    ends = {"eos_token_id": generation.get("eos_token_id", config.get("eos_token_id"))}
    differing = _special_tokens(config, tokenizer, own, vocabulary)
    generating = _special_tokens({**generation, **ends}, tokenizer, own, vocabulary)
    if reward and differing.get("pad_token_id") in _listed(generating["eos_token_id"]):
        differing["pad_token_id"] = None
    return OtherTokenizer(files, differing, generating)


def _files_of(name: str, patterns: tuple[str, ...]) -> dict[str, bytes]:
    """Files of a tokenizer that was loaded before: of a hub name, what the cache has of them at least."""
    local = Path(name).expanduser()
    if not local.is_dir():
        from huggingface_hub import snapshot_download

        local = Path(snapshot_download(name, allow_patterns=list(patterns)))
    return found(local, patterns)


def _check_beside(
    name: str, tokenizer: PreTrainedTokenizerFast, files: Mapping[str, bytes], config: Config, trust_remote_code: bool
) -> None:
    """Transformers looks at the model's config.json too when it makes a tokenizer: whoever loads the model is to get this one."""
    from tulu_mega.data.tokenizer import load_tokenizer

    with tempfile.TemporaryDirectory() as place:
        for each, content in {**files, CONFIG: as_json(config)}.items():
            Path(place, each).write_bytes(content)
        try:
            beside = load_tokenizer(place, trust_remote_code=trust_remote_code)
        except UserError as error:
            reason = "; ".join(error.problems).replace(place, name)
            raise UserError(f"data.tokenizer = {name!r}: cannot be loaded beside the model's config.json: {reason}") from None
    if _identity(beside) != _identity(tokenizer):
        raise UserError(
            f"data.tokenizer = {name!r}: beside a {config.get('model_type')} model's config.json transformers makes another "
            f"tokenizer of its files ({type(beside).__name__}) than without ({type(tokenizer).__name__}), so whoever loads the "
            "trained model would have other tokens; give a tokenizer that was made for such models"
        )


def _identity(tokenizer: PreTrainedTokenizerFast) -> tuple[Any, ...]:
    """All that decides which tokens a text or a conversation becomes."""
    return tokenizer.backend_tokenizer.to_str(), tokenizer.special_tokens_map, tokenizer.chat_template


def _special_tokens(
    named: Mapping[str, Any], tokenizer: PreTrainedTokenizerFast, own: PreTrainedTokenizerFast | None, vocabulary: int
) -> dict[str, Any]:
    """The numbers of special tokens that a config names, with another tokenizer.

    Args:
        named: the config.
        own: the tokenizer that it was made for, if there is one.
        vocabulary: entries of the model's.
    """

    def same(token: int | None) -> bool:
        if token is None or own is None:
            return False
        here, there = (each.convert_ids_to_tokens(token) for each in (own, tokenizer))
        return here is not None and here == there

    found: dict[str, Any] = {}
    for field in ("bos_token_id", "pad_token_id"):
        if field in named:
            token = getattr(tokenizer, field)
            known = token is not None and token < vocabulary
            found[field] = token if known else named[field] if same(named[field]) else None
    if "eos_token_id" in named:
        ends = [tokenizer.eos_token_id]
        ends += [each for each in _listed(named["eos_token_id"]) if each not in ends and same(each)]
        found["eos_token_id"] = ends if len(ends) > 1 else ends[0]
    return found


def _listed(tokens: int | list[int] | None) -> list[int | None]:
    return tokens if isinstance(tokens, list) else [tokens]
