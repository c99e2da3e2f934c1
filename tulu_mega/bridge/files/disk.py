"""Tensors' bytes between memory and files: no copy on the way, and the disk at work while the processor is."""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
import sys
from typing import TYPE_CHECKING, BinaryIO

if TYPE_CHECKING:
    from torch import Tensor


def tensor_bytes(tensor: Tensor) -> memoryview:
    """A contiguous CPU tensor's memory, row by row. The tensor must outlive it."""
    # not through NumPy, which makes a tensor's memory impossible to free early
    return memoryview((ctypes.c_ubyte * tensor.nbytes).from_address(tensor.data_ptr() if tensor.nbytes else 1)).cast("B")


def read_into(file: BinaryIO, offset: int, target: Tensor) -> None:
    """Fills a contiguous CPU tensor with the bytes at an offset of a file.

    Raises:
        EOFError: the file ends before.
        OSError: it cannot be read.
    """
    left = tensor_bytes(target)
    _advise(file, offset, len(left), "POSIX_FADV_WILLNEED")
    while left:
        done = os.preadv(file.fileno(), [left], offset)
        if not done:
            raise EOFError(f"the file ends at byte {offset}")
        offset, left = offset + done, left[done:]


def begin_writing_out(file: BinaryIO, start: int) -> None:
    """Have the disk begin to write what was written from a place on, instead of all of it when the file is synced."""
    file.flush()
    # of written pages this is what it comes to on Linux; they are dropped only where they are on disk already
    _advise(file, start, file.tell() - start, "POSIX_FADV_DONTNEED")


def begin_reading(mapped: Tensor) -> None:
    """Have the disk begin to read a contiguous view into a mapped file, whose pages would otherwise come as they are touched."""
    libc = _libc()
    if libc is not None and mapped.nbytes:
        before = mapped.data_ptr() % mmap.PAGESIZE
        libc.madvise(ctypes.c_void_p(mapped.data_ptr() - before), ctypes.c_size_t(mapped.nbytes + before), mmap.MADV_WILLNEED)


def _advise(file: BinaryIO, start: int, length: int, advice: str) -> None:
    if length and hasattr(os, "posix_fadvise"):  # not on every Unix
        os.posix_fadvise(file.fileno(), start, length, getattr(os, advice))


@functools.cache
def _libc() -> ctypes.CDLL | None:
    return ctypes.CDLL(None) if sys.platform.startswith("linux") else None
