"""New Hugging Face model directories, written as a stream in the safetensors format."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from tulu_mega.bridge.files.disk import begin_writing_out, tensor_bytes
from tulu_mega.bridge.files.hf_files import INDEX, SINGLE, TensorInfo

if TYPE_CHECKING:
    import torch


Files = dict[str, dict[str, TensorInfo]]
"""File name -> the tensors in it, in the order they are written."""


def plan_files(parts: Sequence[Mapping[str, TensorInfo]], max_bytes: int = 5 * 2**30) -> list[Files]:
    """Spreads tensors over files of at most ``max_bytes`` of weights (a larger tensor has a file of its own).

    Args:
        parts: what each writer will write, in its order; no file is shared between writers.

    Returns:
        Each part's files, numbered through all parts as transformers names them.
    """
    cut = [_cut(part, max_bytes) for part in parts]
    count = sum(len(files) for files in cut)
    numbers = iter(range(1, count + 1))
    return [{_file_name(next(numbers), count): tensors for tensors in files} for files in cut]


def _cut(part: Mapping[str, TensorInfo], max_bytes: int) -> list[dict[str, TensorInfo]]:
    files: list[dict[str, TensorInfo]] = []
    room = 0
    for name, info in part.items():
        if not files or info.nbytes > room:
            files.append({})
            room = max_bytes
        files[-1][name] = info
        room -= info.nbytes
    return files


def _file_name(number: int, count: int) -> str:
    return SINGLE if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"


class ShardWriter:
    """Writes tensors one by one, in the order announced, so that none waits in memory for another.

    Shapes and types are known up front: each file's header goes first::

        plan = plan_files([{"a": TensorInfo("F32", (2, 3))}])
        with ShardWriter(directory, plan[0]) as writer:
            writer.add("a", torch.zeros(2, 3))
        write_index(directory, plan)
    """

    def __init__(self, directory: Path, files: Files):
        self._directory = directory
        self._files = files
        self._order = iter([(file, name) for file, tensors in files.items() for name in tensors])
        self._file: BinaryIO | None = None
        self._name: str | None = None

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind, error, trace) -> None:
        self._finish_file()
        left = [name for _, name in self._order]
        if kind is None and left:
            raise ValueError(f"{len(left)} announced tensors were not written, first {left[0]}")

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Writes the next tensor.

        Raises:
            ValueError: when it is not the one announced, or has another shape or type.
        """
        file, expected = next(self._order, (None, None))
        if file is None or name != expected:
            raise ValueError(f"{name} was written where {expected} was announced")
        given, announced = tensor_info(tensor.shape, tensor.dtype), self._files[file][name]
        if given != announced:
            raise ValueError(f"{name}: {given} was written, {announced} was announced")
        if file != self._name:
            self._start_file(file)
        start = self._file.tell()
        held = tensor.detach().cpu().contiguous()
        self._file.write(tensor_bytes(held))
        begin_writing_out(self._file, start)

    def _start_file(self, file: str) -> None:
        self._finish_file()
        entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        at = 0
        for name, info in self._files[file].items():
            entries[name] = {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": [at, at + info.nbytes]}
            at += info.nbytes
        header = json.dumps(entries, separators=(",", ":")).encode()
        header += b" " * (-len(header) % 8)  # tensors start aligned
        self._name = file
        self._file = (self._directory / file).open("wb")
        self._file.write(len(header).to_bytes(8, "little") + header)

    def _finish_file(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            with file:
                file.flush()
                os.fsync(file.fileno())


def write_index(directory: Path, plan: Sequence[Files]) -> None:
    """Writes the index over all writers' files; a model in one file needs none."""
    weight_map = {name: file for files in plan for file, tensors in files.items() for name in tensors}
    if set(weight_map.values()) == {SINGLE}:
        return
    nbytes = sum(info.nbytes for files in plan for tensors in files.values() for info in tensors.values())
    index = {"metadata": {"total_size": nbytes}, "weight_map": dict(sorted(weight_map.items()))}
    write_durably(directory / INDEX, json.dumps(index, indent=2).encode() + b"\n")


def write_durably(path: Path, content: bytes) -> None:
    """Writes a small file and waits until the disk has it."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def sync_directory(directory: Path) -> None:
    """Waits until the disk has the directory's entries."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def tensor_info(shape: Sequence[int], dtype: torch.dtype) -> TensorInfo:
    """The description of a tensor of a torch type: float32 -> F32, bfloat16 -> BF16."""
    kind, bits = re.fullmatch(r"torch\.([a-z]+)(\d+)", str(dtype)).groups()
    return TensorInfo({"float": "F", "bfloat": "BF", "int": "I", "uint": "U"}[kind] + bits, tuple(shape))
