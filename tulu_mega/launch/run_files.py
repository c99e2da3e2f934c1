"""Writing of small files of a run: an error names the file, and the file stays as it was."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from tulu_mega.errors import UserError

FULL = (errno.ENOSPC, errno.EDQUOT)
"""Error numbers of a full disk and of an exceeded quota."""


@contextlib.contextmanager
def named(file: Path) -> Iterator[None]:
    """Wrap the writing of a file of a run.

    Raises:
        UserError: the file cannot be written.
    """
    try:
        yield
    except OSError as error:
        raise UserError(unwritten(str(file), error)) from None


def unwritten(file: str, error: OSError) -> str:
    """Describe a file that could not be written, and what to do."""
    mend = "make room on its disk" if error.errno in FULL else "see to its disk"
    return (
        f"{file} could not be written: {error.strerror or error}; {mend} and give the same command again: a run goes on from its "
        "newest checkpoint"
    )


def write_whole(file: Path, text: str) -> None:
    """Write a file whole or not at all; what was there before stays until then.

    Raises:
        UserError: it cannot be written.
    """
    partial = file.with_name(f".{file.name}.partial")
    with named(file):
        try:
            partial.write_text(text, encoding="utf-8")
            partial.replace(file)
        except OSError:
            partial.unlink(missing_ok=True)
            raise


class Lines:
    """A file that grows by whole lines, each with the operating system when `append` returns. Its directory is made if missing.

    Raises:
        UserError: it cannot be opened.
    """

    def __init__(self, file: Path):
        self._path = file
        with named(file):
            file.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(file, "ab", buffering=0)  # noqa: SIM115 (closed by close)

    def append(self, line: str) -> None:
        """
        Args:
            line: without the character that ends it.

        Raises:
            UserError: it cannot be written; no part of it is in the file then.
        """
        before = os.fstat(self._file.fileno()).st_size
        rest = memoryview(f"{line}\n".encode())
        with named(self._path):
            try:
                while rest:
                    rest = rest[self._file.write(rest) :]
            except OSError:
                with contextlib.suppress(OSError):
                    self._file.truncate(before)
                raise

    def close(self) -> None:
        with named(self._path):
            self._file.close()

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
