"""What lies beside a model's weights: config.json, tokenizer, chat template; and how a finished directory takes its name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

from tulu_mega.bridge.hf_writer import sync_directory, write_durably
from tulu_mega.bridge.rules import Config

_GENERATION = "generation_config.json"
_COPIED = (
    _GENERATION,
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


def write_companions(
    directory: Path, source: Path, config: Config, dtype_name: str, extra_files: Mapping[str, str] | None = None
) -> None:
    """Writes config.json and copies what there is of tokenizer, chat template and, for a model that generates, generation config.

    Args:
        source: directory they are copied from.
        config: the model's config.json.
        dtype_name: of the weights, as config.json spells it: ``bfloat16``.
        extra_files: name -> text of files that are written beside or instead of the copied ones.
    """
    keys = [key for key in ("dtype", "torch_dtype") if key in config] or ["dtype"]
    written = {**config, **dict.fromkeys(keys, dtype_name)}
    files = {each: (source / each).read_bytes() for each in _COPIED if (source / each).is_file()}
    if not any(each.endswith("ForCausalLM") for each in config.get("architectures") or ()):
        files.pop(_GENERATION, None)
    files["config.json"] = json.dumps(written, indent=2).encode() + b"\n"
    files |= {each: text.encode() for each, text in (extra_files or {}).items()}
    for each, content in files.items():
        write_durably(directory / each, content)


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
