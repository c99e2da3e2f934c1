"""A model's config.json and generation_config.json as they stand: what families read, without transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tulu_mega.bridge.files.untrusted import read_json
from tulu_mega.errors import UserError

GENERATION = "generation_config.json"


def read_config(directory: Path, hint: str = "give the directory of a Hugging Face model") -> dict[str, Any]:
    """config.json of a directory.

    Args:
        hint: what to do where there is none.

    Raises:
        UserError: there is none, or it is no JSON object.
    """
    path = directory / "config.json"
    try:
        config = read_json(path)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path}: no such file; {hint}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON: {error}") from None
    if not isinstance(config, dict):
        raise UserError(f"{path}: holds {type(config).__name__}, expected a JSON object")
    return config


def read_generation(directory: Path) -> dict[str, Any]:
    """generation_config.json of a directory; empty where there is none.

    Raises:
        UserError: it is no JSON object.
    """
    path = directory / GENERATION
    try:
        found = read_json(path)
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON: {error}; download or export it again, or remove it") from None
    if not isinstance(found, dict):
        told = f"{path}: holds {type(found).__name__}, expected a JSON object"
        raise UserError(f"{told}; download or export it again, or remove it")
    return found
