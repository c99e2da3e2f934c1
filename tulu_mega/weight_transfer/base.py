"""Which weights a model has before anything is trained, in short: trainer and servers compare it where adapters alone travel."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

from tulu_mega.outside.json_input import read_json_text

_SAMPLES, _BYTES = 4, 4096
"""Of each tensor so many stretches of so many bytes are read: training changes some of the millions of numbers in them, and of
a model of any size they are read in seconds."""
_MAX_HEADER = 1 << 28
_NARROW = "bfloat16"


def identity(directory: str | Path, dtype: str) -> str:
    """Return a word for a model's weights as they are in memory; the same weights in other files have the same one.

    Args:
        directory: the model's, with safetensors.
        dtype: torch's name of the narrowest type that the weights have passed through since they were read.

    Returns:
        "" where the directory has none, or they cannot be read: such weights are no others'.
    """
    found: dict[str, str] = {}
    types = set()
    try:
        for file in sorted(Path(directory).glob("*.safetensors")):
            with file.open("rb") as opened:
                length = int.from_bytes(opened.read(8), "little")
                if length > _MAX_HEADER:
                    return ""
                header = read_json_text(opened.read(length).decode())
                header.pop("__metadata__", None)
                for name, entry in header.items():
                    start, stop = entry["data_offsets"]
                    types.add(entry["dtype"])
                    taken = hashlib.sha256(json.dumps([entry["dtype"], entry["shape"]]).encode())
                    for at in _stretches(stop - start):
                        taken.update(os.pread(opened.fileno(), min(_BYTES, stop - start - at), 8 + length + start + at))
                    found[name] = taken.hexdigest()
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return ""
    if not found:
        return ""
    rounded = _NARROW if types == {"BF16"} else dtype
    return f"{hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()[:32]}-{rounded}"


def _stretches(nbytes: int) -> list[int]:
    """Where in a tensor of so many bytes stretches begin: spread over all of it, without its end left out.

    >>> _stretches(100), _stretches(40960)
    ([0], [0, 12288, 24576, 36864])
    """
    last = nbytes - _BYTES
    return sorted({last * at // (_SAMPLES - 1) for at in range(_SAMPLES)}) if last > 0 else [0]
