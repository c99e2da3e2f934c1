"""Where weights go: the files of a new directory in either format, each written at one go, read back and made whole."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from tulu_mega.bridge.box import Box
from tulu_mega.bridge.files import megatron_files
from tulu_mega.bridge.files.hf_files import HfCheckpoint
from tulu_mega.bridge.files.hf_writer import ShardWriter, plan_files, tensor_info, write_index
from tulu_mega.bridge.megatron_keys import Slab, slabs, stored_parameters
from tulu_mega.bridge.rules import Config, Family
from tulu_mega.convert.manifest import Entry, FileRecord, entry
from tulu_mega.convert.sources import Source
from tulu_mega.distributed.grid import ShardGrid

_SLAB_BYTES = 64 * 2**20  # small enough to keep a buffer of each size that occurs


class Target(Protocol):
    """A new directory."""

    names: list[str]
    """names of its files"""

    def write(self, number: int, directory: Path, source: Source) -> FileRecord:
        """Writes a file. It is on disk when this returns."""

    def read(self, number: int, directory: Path, record: FileRecord) -> Iterator[tuple[str, Tensor]]:
        """The tensors of a written file, one at a time. Raises UserError or the format's own errors where it is damaged."""

    def finish(self, directory: Path, records: list[FileRecord]) -> None:
        """Writes what makes the files one model."""


class HfTarget:
    """safetensors files and their index."""

    def __init__(self, family: Family, config: Config, dtype: torch.dtype, file_bytes: int):
        shapes = family.hf_shapes(config)
        # tensors that are made of one parameter are neighbours, so that it is read once
        order = dict.fromkeys(
            piece.hf_name for each in stored_parameters(family, config) for piece in family.pieces(each.name, config, ShardGrid())
        )
        self._dtype = dtype
        self._plan = plan_files([{name: tensor_info(shapes[name], dtype) for name in order}], file_bytes)
        self._files = self._plan[0]
        self.names = list(self._files)

    def write(self, number: int, directory: Path, source: Source) -> FileRecord:
        file = self.names[number]
        tensors: dict[str, Entry] = {}
        with ShardWriter(directory, {file: self._files[file]}) as writer:
            for name in self._files[file]:
                tensor = source.tensor(name, self._dtype)
                tensors[name] = entry(tensor)
                writer.add(name, tensor)
        return FileRecord(file, (directory / file).stat().st_size, tensors)

    def read(self, number: int, directory: Path, record: FileRecord) -> Iterator[tuple[str, Tensor]]:
        file = self.names[number]
        held = {name: replace(tensor_info(each.shape, self._dtype), file=file) for name, each in record.tensors.items()}
        opened = HfCheckpoint(directory, {}, held)
        for name, each in record.tensors.items():
            yield name, opened.read_box(name, Box.whole(each.shape))
        opened.close()

    def finish(self, directory: Path, records: list[FileRecord]) -> None:
        write_index(directory, self._plan)


class MegatronTarget:
    """A distributed checkpoint's files and their index."""

    def __init__(self, family: Family, config: Config, dtype: torch.dtype, file_bytes: int):
        self._dtype = dtype
        self._files: list[list[Slab]] = []
        room = 0
        for slab in slabs(stored_parameters(family, config), dtype.itemsize, min(_SLAB_BYTES, file_bytes)):
            size = torch.Size(slab.shape).numel() * dtype.itemsize
            if not self._files or size > room:
                self._files.append([])
                room = file_bytes
            self._files[-1].append(slab)
            room -= size
        self.names = [megatron_files.file_name(number) for number in range(len(self._files))]

    def write(self, number: int, directory: Path, source: Source) -> FileRecord:
        held: dict[Slab, Entry] = {}
        buffers: dict[int, Tensor] = {}  # used again: fresh memory costs as much as what is done with it

        def read(slab: Slab) -> Tensor:
            count = math.prod(slab.shape)
            if count not in buffers:
                buffers[count] = torch.empty(count, dtype=self._dtype)
            tensor = buffers[count].view(slab.shape)
            source.fill(slab, tensor)
            held[slab] = entry(tensor)
            return tensor

        places = megatron_files.write_file(directory, number, self._files[number], read)
        tensors = {slab.name: replace(held[slab], place=place) for slab, place in zip(self._files[number], places, strict=True)}
        file = self.names[number]
        return FileRecord(file, (directory / file).stat().st_size, tensors)

    def read(self, number: int, directory: Path, record: FileRecord) -> Iterator[tuple[str, Tensor]]:
        opened = megatron_files.opened(directory, {number: self._places(number, record)}, self._dtype)
        for slab in self._files[number]:
            tensor = torch.empty(slab.shape, dtype=self._dtype)
            opened.read(slab.parameter.key, slab.box, tensor)
            yield slab.name, tensor

    def finish(self, directory: Path, records: list[FileRecord]) -> None:
        files = {number: self._places(number, record) for number, record in enumerate(records)}
        megatron_files.finish(directory, files, self._dtype)

    def _places(self, number: int, record: FileRecord) -> dict[Slab, megatron_files.Place]:
        return {slab: record.tensors[slab.name].place for slab in self._files[number]}
