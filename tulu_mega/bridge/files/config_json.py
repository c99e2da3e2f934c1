"""A model's config.json as it stands: what families read, without transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tulu_mega.bridge.files.untrusted import read_json
from tulu_mega.errors import UserError


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
