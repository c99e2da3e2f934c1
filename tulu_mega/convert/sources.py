"""Where weights come from: rows of Megatron's parameters or whole Hugging Face tensors, out of either format.

Where the source is a conversion's own output, its manifest's hashes are held against what is read.
"""

from __future__ import annotations

import math
from collections import defaultdict
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from tulu_mega.bridge.box import Box
from tulu_mega.bridge.files.disk import begin_reading
from tulu_mega.bridge.files.hf_files import HfCheckpoint
from tulu_mega.bridge.files.megatron_files import MegatronCheckpoint
from tulu_mega.bridge.megatron_keys import Slab, StoredParameter, stored_parameters
from tulu_mega.bridge.rules import Config, Family, Piece
from tulu_mega.convert.manifest import hashes, matches
from tulu_mega.distributed.grid import ShardGrid
from tulu_mega.errors import UserError


class Source(Protocol):
    """Weights of a model."""

    dtype: torch.dtype
    """type of all weights; the widest where they differ"""

    def fill(self, slab: Slab, out: Tensor) -> None:
        """Puts rows of a Megatron parameter into a tensor, in its type; padding of the vocabulary is zero. Raises UserError."""

    def tensor(self, name: str, dtype: torch.dtype) -> Tensor:
        """A whole Hugging Face tensor, to be read only and until the next is asked for. Raises UserError."""

    def files(self) -> list[Path]:
        """The files that hold the weights."""


class HfSource:
    """A Hugging Face directory."""

    def __init__(self, directory: Path, family: Family, config: Config):
        self._checkpoint = HfCheckpoint.open(directory)
        problems = self._checkpoint.check(family.hf_shapes(config), family.ignorable(config))
        problems = problems or self._checkpoint.check_tied(family.tied(config))
        if problems:
            raise UserError(problems)
        self._family, self._config = family, config
        self._hashes, self._sound = hashes(directory), set[str]()
        kinds = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
        held = {kinds[self._checkpoint.tensors[name].dtype] for name in family.hf_shapes(config)}
        self.dtype = held.pop() if len(held) == 1 else torch.float32

    def fill(self, slab: Slab, out: Tensor) -> None:
        filled = 0
        for piece in self._family.pieces(slab.parameter.name, self._config, ShardGrid()):
            start, stop = piece.local_box[0]
            low, high = max(start, slab.start), min(stop, slab.stop)
            if low >= high:
                continue
            first = piece.hf_box[0][0] + low - start
            rows = Box(((first, first + high - low), *piece.hf_box[1:]))
            self._check(piece.hf_name)
            values = self._checkpoint.read_box(piece.hf_name, rows)
            begin_reading(values)
            out[low - slab.start : high - slab.start].copy_(values)
            filled = high - slab.start
        out[filled:].zero_()

    def tensor(self, name: str, dtype: torch.dtype) -> Tensor:
        self._check(name)
        return self._whole(name).to(dtype)

    def files(self) -> list[Path]:
        return sorted({self._checkpoint.path / info.file for info in self._checkpoint.tensors.values()})

    def _whole(self, name: str) -> Tensor:
        whole = self._checkpoint.read_box(name, Box.whole(self._checkpoint.tensors[name].shape))
        begin_reading(whole)
        return whole

    def _check(self, name: str) -> None:
        if name in self._sound or name not in self._hashes:
            return
        if not matches(self._whole(name), self._hashes[name]):
            raise UserError(_damaged(self._checkpoint.path / self._checkpoint.tensors[name].file, name))
        self._sound.add(name)


class MegatronSource:
    """A Megatron distributed checkpoint."""

    def __init__(self, directory: Path, family: Family, config: Config):
        self._checkpoint = MegatronCheckpoint.open(directory)
        parameters = stored_parameters(family, config)
        problems = self._checkpoint.check(parameters)
        if problems:
            raise UserError(problems)
        held = {self._checkpoint.tensors[each.key][1] for each in parameters}
        self.dtype = held.pop() if len(held) == 1 else torch.float32
        self._hashed = _hashed_slabs(hashes(directory), parameters)
        self._places: dict[str, list[tuple[StoredParameter, Piece]]] = defaultdict(list)
        for parameter in parameters:
            for piece in family.pieces(parameter.name, config, ShardGrid()):
                self._places[piece.hf_name].append((parameter, piece))
        self._at: tuple[str, Tensor] | None = None
        # one parameter after another lies in the same memory: fresh memory costs as much as filling it
        self._largest = max(math.prod(each.shape) for each in parameters)
        self._buffer: Tensor | None = None

    def fill(self, slab: Slab, out: Tensor) -> None:
        parameter = slab.parameter
        known = self._hashed.get(parameter.name)
        if not known:
            self._checkpoint.read(parameter.key, slab.box, out)
            return
        dtype = self._checkpoint.tensors[parameter.key][1]
        for stored, wanted in known:
            low, high = max(stored.start, slab.start), min(stored.stop, slab.stop)
            if low >= high:
                continue
            box = out[low - slab.start : high - slab.start]
            whole = box.dtype == dtype and (low, high) == (stored.start, stored.stop)
            held = box if whole else torch.empty(stored.shape, dtype=dtype)
            self._checkpoint.read(parameter.key, stored.box, held)
            if not matches(held, wanted):
                raise UserError(_damaged(self._checkpoint.file(parameter.key, stored.box), stored.name))
            if not whole:
                box.copy_(held[low - stored.start : high - stored.start])

    def tensor(self, name: str, dtype: torch.dtype) -> Tensor:
        places = self._places[name]
        whole = self._whole(places[0][0], dtype)
        boxes = [whole[piece.local_box.slices] for _, piece in places]
        return boxes[0] if len(boxes) == 1 else torch.cat(boxes)

    def files(self) -> list[Path]:
        return self._checkpoint.files()

    def _whole(self, parameter: StoredParameter, dtype: torch.dtype) -> Tensor:
        """A parameter, kept until another is asked for: query, key and value are made of one."""
        if self._at is None or self._at[0] != parameter.name:
            self._at = None
            if self._buffer is None or self._buffer.dtype != dtype:
                self._buffer = torch.empty(self._largest, dtype=dtype)
            whole = self._buffer[: math.prod(parameter.shape)].view(parameter.shape)
            self.fill(Slab(parameter, 0, parameter.shape[0]), whole)
            self._at = (parameter.name, whole)
        return self._at[1]


def _hashed_slabs(known: dict[str, str], parameters: list[StoredParameter]) -> dict[str, list[tuple[Slab, str]]]:
    """By parameter, the slabs whose hashes a manifest has."""
    by_name = {parameter.name: parameter for parameter in parameters}
    found: dict[str, list[tuple[Slab, str]]] = defaultdict(list)
    for name, wanted in known.items():
        parameter, _, rows = name.removesuffix("]").partition("[")
        if parameter in by_name and rows:
            start, stop = map(int, rows.split(":"))
            found[parameter].append((Slab(by_name[parameter], start, stop), wanted))
    return found


def _damaged(file: Path, tensor: str) -> str:
    return f"{file}: tensor {tensor} is not what was written there (its hash differs); the file is damaged, make it again"
