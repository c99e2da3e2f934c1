"""Files of unknown origin: opened only where they are plain files, parsed within bounds, `ValueError` for all that is wrong.

What Python's own functions do with a hostile file: `open` waits for ever on a FIFO and reads a device without end.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any, BinaryIO

from tulu_mega.outside.json_input import parse_json

MAX_JSON_BYTES = 256 << 20
"""Most bytes of a JSON file. The index of a model of 405B parameters, the largest that is read so, has a quarter of a
megabyte."""
_KINDS = {
    stat.S_IFIFO: "a FIFO", stat.S_IFCHR: "a character device", stat.S_IFBLK: "a block device", stat.S_IFSOCK: "a socket",
    stat.S_IFDIR: "a directory",
}  # fmt: skip


def open_plain(path: Path) -> BinaryIO:
    """Opens a file for reading; never waits for somebody to write to it.

    Raises:
        OSError: it is not there, is no plain file, or cannot be opened.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # without O_NONBLOCK a FIFO waits here
    try:
        mode = os.fstat(descriptor).st_mode
        if not stat.S_ISREG(mode):
            raise OSError(f"it is {_KINDS.get(stat.S_IFMT(mode), 'no file')}, expected a plain file")
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_json(path: Path, limit: int = MAX_JSON_BYTES) -> Any:
    """Content of a JSON file.

    Args:
        limit: bytes it may have.

    Raises:
        OSError: as `open_plain`.
        ValueError: it is larger than the limit, or no JSON; see `json_input.parse_json`.
    """
    with open_plain(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise ValueError(f"it has {size} bytes, at most {limit} are read")
        return parse_json(file.read(limit))
