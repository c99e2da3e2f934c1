"""Where a model lies on this machine: a directory as it is, a hub name after download."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from tulu_mega.errors import UserError

MARK = "metadata.json"
"""The file by which a Megatron distributed checkpoint is known."""

_FETCHED = ("*.safetensors", "*.json", "*.jinja", "tokenizer.model", "merges.txt", "vocab.txt", "*.py")
"""All that counts of a model is there from the first, code that may be run too: what comes later would be another content."""


def is_megatron(directory: Path) -> bool:
    """Whether a directory is a Megatron distributed checkpoint."""
    return (directory / MARK).is_file() and not any(directory.glob("*.safetensors"))


def model_directory(path: str) -> Path:
    """The directory of a model; a hub name is fetched into the hub's cache first (safetensors, config, tokenizer, Python code).

    Raises:
        UserError: when it is neither a directory nor a hub name that can be fetched.
    """

    def fetch() -> str:
        from huggingface_hub import snapshot_download

        return snapshot_download(path, allow_patterns=list(_FETCHED))

    return _directory(path, fetch)


def local_directory(path: str) -> Path | None:
    """The directory of a model where it lies on this machine already; nothing is fetched."""

    def fetch() -> str:
        from huggingface_hub import snapshot_download

        return snapshot_download(path, local_files_only=True)

    try:
        return _directory(path, fetch)
    except UserError:
        return None


def config_directory(path: str) -> Path:
    """The directory of a model's config.json; of a hub name nothing else is fetched.

    Raises:
        UserError: as `model_directory`.
    """

    def fetch() -> str:
        from huggingface_hub import hf_hub_download

        return os.path.dirname(hf_hub_download(path, "config.json"))

    return _directory(path, fetch)


def _directory(path: str, fetch: Callable[[], str]) -> Path:
    local = Path(path).expanduser()
    if local.is_dir():
        return local
    if path.startswith(("/", ".", "~")) or path.count("/") != 1:
        raise UserError(f"model.path = {path!r}: no such directory; give the directory of a Hugging Face model or a hub name")
    try:
        return Path(fetch())
    except Exception as error:  # the hub client's many kinds: no network, no such name, no access
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise UserError(f"model.path = {path!r}: no such directory, and the hub did not give it: {reason}") from None
