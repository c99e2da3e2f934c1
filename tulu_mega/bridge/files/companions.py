"""What lies beside the weights of a Hugging Face directory."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tulu_mega.bridge.files.config_json import GENERATION, read_generation
from tulu_mega.bridge.files.hf_writer import sync_directory, write_durably
from tulu_mega.bridge.rules import Config

CONFIG = "config.json"
TOKENIZER = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
"""Files that a tokenizer may have."""


@dataclass(frozen=True)
class OtherTokenizer:
    """What goes with a model that was trained with another tokenizer than its own (`bridge.other_tokenizer`)."""

    files: Mapping[str, bytes]
    """by name, its chat template among them"""
    config: Mapping[str, Any]
    """fields of config.json that differ: special tokens"""
    generation: Mapping[str, Any]
    """the same of generation_config.json"""


def write_companions(
    directory: Path,
    source: Path,
    config: Config,
    dtype_name: str,
    extra_files: Mapping[str, str] | None = None,
    tokenizer: OtherTokenizer | None = None,
    ends: Sequence[int] = (),
) -> None:
    """Writes config.json and copies what there is of tokenizer, chat template and, for a model that generates, generation config.

    Args:
        source: directory they are copied from.
        config: the model's config.json.
        dtype_name: of the weights, as config.json spells it: ``bfloat16``.
        extra_files: name -> text of files that are written beside or instead of the copied ones.
        tokenizer: goes with the model in the place of the source's, of which nothing is copied then: two do not mix.
        ends: tokens at which generation stops, beside those that the model names: turns ended with them in training.
    """
    keys = [key for key in ("dtype", "torch_dtype") if key in config] or ["dtype"]
    written = {**config, **dict.fromkeys(keys, dtype_name), **(tokenizer.config if tokenizer else {})}
    files = dict(tokenizer.files) if tokenizer else found(source, TOKENIZER)
    if any(str(each).endswith("ForCausalLM") for each in config.get("architectures") or ()):
        files |= found(source, (GENERATION,))
        generation = read_generation(source)
        if tokenizer:
            generation |= tokenizer.generation
            files[GENERATION] = as_json(generation)
        files |= _stopping(generation if GENERATION in files else None, written, ends)
    files[CONFIG] = as_json(written)
    files |= {each: text.encode() for each, text in (extra_files or {}).items()}
    for each, content in files.items():
        write_durably(directory / each, content)


def _stopping(generation: Config | None, config: Config, ends: Sequence[int]) -> dict[str, bytes]:
    """generation_config.json with further tokens that end an answer; nothing where it names them all.

    A model without that file generates by its config.json, whose special tokens go over.
    """
    special = {each: config[each] for each in ("bos_token_id", "eos_token_id", "pad_token_id") if config.get(each) is not None}
    content = special if generation is None else generation
    named = content.get("eos_token_id", special.get("eos_token_id"))
    named = named if isinstance(named, list) else [] if named is None else [named]
    if missing := [each for each in ends if each not in named]:
        stops = [*named, *missing]
        return {GENERATION: as_json({**content, "eos_token_id": stops if len(stops) > 1 else stops[0]})}
    return {}


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


def found(directory: Path, patterns: tuple[str, ...]) -> dict[str, bytes]:
    """Files of a directory, by name."""
    return {file.name: file.read_bytes() for each in patterns for file in directory.glob(each) if file.is_file()}


def as_json(content: Mapping[str, Any]) -> bytes:
    """Return a config's content as the bytes of its file."""
    return json.dumps(content, indent=2).encode() + b"\n"
