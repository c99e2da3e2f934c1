"""Digests of files of rows."""

from __future__ import annotations

import hashlib
from pathlib import Path


def directory_sha256(path: Path, split: str) -> str:
    """Return the digest of all files below a directory and of the split's name; the directory's own path does not count."""
    parts = [split]
    for file in sorted(path.rglob("*")):
        inside = file.relative_to(path)
        if file.is_file() and not any(part.startswith(".") for part in inside.parts):
            parts.append(f"{inside}:{sha256(file)}")
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
