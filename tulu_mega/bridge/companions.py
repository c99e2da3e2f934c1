"""What lies beside a model's weights: config.json, tokenizer, chat template; and how a finished directory takes its name."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tulu_mega.bridge.hf_writer import sync_directory, write_durably
from tulu_mega.bridge.rules import Config
from tulu_mega.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_CONFIG, _GENERATION = "config.json", "generation_config.json"
_TEMPLATES = ("chat_template.jinja", "chat_template.json")
_VOCABULARY = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
)
_TOKENIZER = (*_VOCABULARY, *_TEMPLATES)


def write_companions(
    directory: Path, source: Path, config: Config, dtype_name: str, extra_files: Mapping[str, str | bytes] | None = None
) -> None:
    """Writes config.json and copies what there is of tokenizer, chat template and, for a model that generates, generation config.

    Args:
        source: directory they are copied from.
        config: the model's config.json.
        dtype_name: of the weights, as config.json spells it: ``bfloat16``.
        extra_files: name -> content of files that are written beside or instead of the copied ones. Where a tokenizer is among
            them, nothing of the source's is copied: two do not mix. Of config.json and generation_config.json they have the
            fields that differ from the model's.
    """
    extra = dict(extra_files or {})
    keys = [key for key in ("dtype", "torch_dtype") if key in config] or ["dtype"]
    written = {**config, **dict.fromkeys(keys, dtype_name), **json.loads(extra.pop(_CONFIG, "{}"))}
    copied = () if extra.keys() & set(_VOCABULARY) else _TOKENIZER
    files = _found(source, copied)
    if any(each.endswith("ForCausalLM") for each in config.get("architectures") or ()):
        files |= _found(source, (_GENERATION,))
        if differing := json.loads(extra.get(_GENERATION, "{}")):
            files[_GENERATION] = _json(json.loads(files.get(_GENERATION, "{}")) | differing)
    extra.pop(_GENERATION, None)
    files[_CONFIG] = _json(written)
    files |= {each: content if isinstance(content, bytes) else content.encode() for each, content in extra.items()}
    for each, content in files.items():
        write_durably(directory / each, content)


def other_tokenizer(
    name: str, model: Path, config: Config, reward: bool = False, trust_remote_code: bool = False
) -> dict[str, str | bytes]:
    """What goes with a model that was trained with another tokenizer than its own: `extra_files` of :func:`write_companions`.

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
    files = _files_of(name, (*_TOKENIZER, "*.py") if trust_remote_code else _TOKENIZER)
    _check_beside(name, tokenizer, files, config, trust_remote_code)
    try:
        own = load_tokenizer(str(model), trust_remote_code=trust_remote_code)
    except UserError:  # the model needs none of its own
        own = None
    generation = json.loads(_found(model, (_GENERATION,)).get(_GENERATION, "{}"))
    ends = {"eos_token_id": generation.get("eos_token_id", config.get("eos_token_id"))}
    differing = _special_tokens(config, tokenizer, own, vocabulary)
    generating = _special_tokens({**generation, **ends}, tokenizer, own, vocabulary)
    if reward and differing.get("pad_token_id") in _listed(generating["eos_token_id"]):
        differing["pad_token_id"] = None
    return {**files, _CONFIG: json.dumps(differing), _GENERATION: json.dumps(generating)}


def put_in_place(partial: Path, final: Path) -> None:
    """The complete directory takes its name; the one it replaces goes afterwards."""
    sync_directory(partial)
    old = final.with_name(f".{final.name}.old")
    if final.exists():
        shutil.rmtree(old, ignore_errors=True)
        final.rename(old)
    partial.rename(final)
    sync_directory(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def _found(directory: Path, patterns: tuple[str, ...]) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for each in patterns for file in directory.glob(each) if file.is_file()}


def _json(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, indent=2).encode() + b"\n"


def _files_of(name: str, patterns: tuple[str, ...]) -> dict[str, bytes]:
    """Files of a tokenizer that was loaded before: of a hub name, what the cache has of them at least."""
    local = Path(name).expanduser()
    if not local.is_dir():
        from huggingface_hub import snapshot_download

        local = Path(snapshot_download(name, allow_patterns=list(patterns)))
    return _found(local, patterns)


def _check_beside(
    name: str, tokenizer: PreTrainedTokenizerFast, files: Mapping[str, bytes], config: Config, trust_remote_code: bool
) -> None:
    """Transformers looks at the model's config.json too when it makes a tokenizer: whoever loads the model is to get this one."""
    from tulu_mega.data.tokenizer import load_tokenizer

    with tempfile.TemporaryDirectory() as place:
        for each, content in {**files, _CONFIG: _json(config)}.items():
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
