"""Compressed files of rows, as plain ones that can be read from any place."""

from __future__ import annotations

import gzip
import shutil
import tempfile
import zlib
from pathlib import Path
from typing import IO

from tulu_mega.errors import UserError

SUFFIXES = (".gz", ".zst")


def plain_suffix(path: Path) -> str:
    """The suffix of a file's content, in small letters: ``.jsonl`` of ``rows.jsonl.gz``."""
    return (path.with_suffix("") if path.suffix.lower() in SUFFIXES else path).suffix.lower()


def unpacked(path: Path) -> IO[bytes] | None:
    """A temporary file with the text of a compressed one, which goes when it is closed; None of a file that is not compressed.

    Rows are read by their place, which compressed text does not know: a place in it costs all that stands before.

    Raises:
        UserError: the file is damaged, cut off or of another kind, or there is no room for its text.
        OSError: it cannot be read.
    """
    if path.suffix.lower() not in SUFFIXES:
        return None
    text = tempfile.NamedTemporaryFile(prefix="tulu_mega_rows_", suffix=plain_suffix(path))  # noqa: SIM115 (the caller has it)
    with open(path, "rb") as file:
        try:
            with _reader(file, path.suffix.lower()) as reader:
                while block := _block(reader, path):
                    text.write(block)
            text.flush()
        except OSError as error:
            text.close()
            raise UserError(
                f"{path}: no room for its text in {tempfile.gettempdir()}: {error.strerror or error}; name another directory in "
                "TMPDIR, or unpack the file yourself"
            ) from None
        except BaseException:
            text.close()
            raise
    return text


def _reader(file: IO[bytes], suffix: str) -> IO[bytes]:
    if suffix == ".gz":
        return gzip.GzipFile(fileobj=file, mode="rb")
    import pyarrow

    return pyarrow.CompressedInputStream(file, "zstd")


def _block(reader: IO[bytes], path: Path) -> bytes:
    try:
        return reader.read(shutil.COPY_BUFSIZE)
    except (OSError, EOFError, zlib.error) as error:
        what = {".gz": "gzip", ".zst": "zstd"}[path.suffix.lower()]
        raise UserError(f"{path}: cannot be unpacked as {what}: {str(error).rstrip('.')}; give the whole file") from None
