"""Megatron's distributed checkpoints as directories: what is in them, boxes out of them, new ones.

The format is torch.distributed.checkpoint's: `__*.distcp` files of tensors, and `.metadata`, which says where each lies (see
`megatron_index`). `metadata.json` and `common.pt` are what megatron-core's loader asks for.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.checkpoint.utils import _create_file_view

from tulu_mega.bridge.box import Box
from tulu_mega.bridge.files.disk import begin_writing_out, read_into
from tulu_mega.bridge.files.hub import MARK
from tulu_mega.bridge.files.megatron_index import INDEX, read_index
from tulu_mega.bridge.files.untrusted import read_json
from tulu_mega.bridge.megatron_keys import Slab, StoredParameter
from tulu_mega.bridge.rules import Shape
from tulu_mega.errors import UserError

_MARK_CONTENT = {"sharded_backend": "torch_dist", "sharded_backend_version": 1, "common_backend": "torch",
                 "common_backend_version": 1}  # fmt: skip
_COMMON = "common.pt"
_AGAIN = "convert or save it again"


@dataclass
class MegatronCheckpoint:
    """A distributed checkpoint whose index has been read and whose files are as long as it says."""

    path: Path
    metadata: Metadata
    _reader: FileSystemReader = field(repr=False)

    @classmethod
    def open(cls, path: str | os.PathLike) -> MegatronCheckpoint:
        """Reads the index and looks at the files' sizes.

        Raises:
            UserError: with everything that is wrong, by file and tensor.
        """
        directory = Path(path)
        try:
            backend = read_json(directory / MARK, limit=1 << 20)["sharded_backend"]
        except (OSError, ValueError, KeyError, TypeError):
            raise UserError(f"{directory / MARK}: missing or not readable; expected a Megatron distributed checkpoint") from None
        if backend != "torch_dist":
            told = f"{directory / MARK}: format {backend!r} is not supported, expected 'torch_dist'"
            raise UserError(f"{told}; save the checkpoint in that format")
        metadata = read_index(directory)
        reader = FileSystemReader(directory)
        reader.set_up_storage_reader(metadata, is_coordinator=True)
        checkpoint = cls(directory, metadata, reader)
        problems = checkpoint._truncated()
        if problems:
            raise UserError(problems)
        return checkpoint

    def _truncated(self) -> list[str]:
        files: dict[str, int | None] = {}
        problems = []
        for index, place in self.metadata.storage_data.items():
            file = place.relative_path
            if file not in files:
                path = self.path / file
                files[file] = path.stat().st_size if path.is_file() else None
                if files[file] is None:
                    problems.append(f"{path}: no such file, though {INDEX} names it (tensor {index.fqn}); {_AGAIN}")
            size = files[file]
            if size is not None and place.offset + place.length > size:
                problems.append(
                    f"{self.path / file}: {size} bytes, tensor {index.fqn} ends at {place.offset + place.length}; "
                    f"the file is truncated; {_AGAIN}"
                )
                files[file] = max(size, place.offset + place.length)  # once a file
        return problems

    @property
    def tensors(self) -> dict[str, tuple[Shape, torch.dtype]]:
        """Shape and type of every tensor, by key; optimizer state among them where it was saved."""
        return {
            key: (tuple(held.size), held.properties.dtype)
            for key, held in self.metadata.state_dict_metadata.items()
            if isinstance(held, TensorStorageMetadata)
        }

    def files(self) -> list[Path]:
        """Every file that holds tensors."""
        return sorted({self.path / place.relative_path for place in self.metadata.storage_data.values()})

    def file(self, key: str, box: Box) -> Path:
        """The file that holds the first stored part of a box."""
        item = self._items(key, box)[0]
        return self.path / self.metadata.storage_data[item.storage_index].relative_path

    def check(self, expected: Sequence[StoredParameter]) -> list[str]:
        """What stands between this checkpoint and the parameters a model asks for; empty when nothing does.

        The vocabulary may be padded to any number of rows, since that depends on the layout it was saved under.
        """
        held = self.tensors
        problems = []
        for key, parameter in {each.key: each for each in expected}.items():
            wanted = parameter.global_shape
            if key not in held:
                problems.append(f"{self.path}: tensor {key} is missing; config.json asks for it")
                continue
            shape, dtype = held[key]
            vocabulary = key in ("embedding.word_embeddings.weight", "output_layer.weight") and len(shape) == 2
            if shape != wanted and not (vocabulary and shape[1] == wanted[1] and shape[0] > wanted[0] - 8):
                problems.append(f"{self.path}: tensor {key} is {list(shape)}, config.json asks for {list(wanted)}")
            if not dtype.is_floating_point or dtype.itemsize < 2:
                problems.append(f"{self.path}: tensor {key} is of type {dtype}, expected float32, bfloat16 or float16")
        return problems

    def read(self, key: str, box: Box, target: Tensor) -> None:
        """Fills ``target`` with a box of a tensor, converting to its type. Takes a stored chunk's memory at a time, or none where
        a chunk fills its part of the target as it lies in the file.

        What the checkpoint does not hold of the box (rows that pad the vocabulary) becomes zero.

        Raises:
            UserError: naming tensor and file, when the bytes there are no tensor.
        """
        sizes = torch.Size(box.shape)
        items = self._items(key, box)
        view = target.view(sizes)
        if sum(item.lengths.numel() for item in items) < sizes.numel():
            view.zero_()
        for item in items:
            try:
                if not self._straight(item, view):
                    self._reader.read_data(LoadPlan([item]), _Into(view))
            except Exception as error:
                file = self.path / self.metadata.storage_data[item.storage_index].relative_path
                raise UserError(f"{file}: tensor {key} cannot be read ({_short(error)}); the file is damaged; {_AGAIN}") from None

    def _straight(self, item: ReadItem, view: Tensor) -> bool:
        """Reads a whole chunk from the file into its place; False, and nothing is read, where it cannot go there unchanged."""
        into = view[_slices(item)]
        place = self.metadata.storage_data[item.storage_index]
        if place.transform_descriptors or any(item.storage_offsets) or not into.is_contiguous() or not into.is_cpu:
            return False
        with open(self.path / place.relative_path, "rb") as file:
            # to the device "meta" torch loads shape, type and the place of the values, and leaves them in the file
            there = torch.load(_create_file_view(file, place.offset, place.length), map_location="meta", weights_only=True)
            at = there.untyped_storage()._checkpoint_offset
            if at is None or (there.shape, there.dtype) != (into.shape, into.dtype) or not there.is_contiguous():
                return False
            read_into(file, place.offset + at + there.storage_offset() * there.itemsize, into)
        return True

    def _items(self, key: str, box: Box) -> list[ReadItem]:
        """The stored parts that a box is made of."""
        chunk = ChunkStorageMetadata(torch.Size(start for start, _ in box), torch.Size(box.shape))
        return create_read_items_for_chunk_list(key, self.metadata.state_dict_metadata[key], [chunk])


def _short(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _slices(item: ReadItem) -> tuple[slice, ...]:
    """Where in the target a stored part goes."""
    return tuple(slice(at, at + n) for at, n in zip(item.dest_offsets, item.lengths, strict=True))


class _Into(LoadPlanner):
    """Puts what is read into one tensor."""

    def __init__(self, target: Tensor):
        self._target = target

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        return self._target[_slices(read_item)]

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        """It is there already."""

    def set_up_planner(self, state_dict, metadata=None, is_coordinator=False) -> None:
        raise NotImplementedError("boxes are read one by one, without a plan over ranks")

    create_local_plan = create_global_plan = finish_plan = load_bytes = set_up_planner


Place = tuple[int, int]
"""Offset and length in a file, bytes."""


def write_file(directory: Path, number: int, parts: Sequence[Slab], read: Callable[[Slab], Tensor]) -> list[Place]:
    """Writes one file of a new checkpoint and waits until the disk has it; one slab is in memory at a time.

    Args:
        number: of the file, from 0: its name is :func:`file_name`'s.
        parts: what goes into it.
        read: gives a slab's values, as the whole of a tensor's memory, which may be used again for the next one.

    Returns:
        Where each part lies.

    Raises:
        OSError: the disk refuses.
    """
    places = []
    with (directory / file_name(number)).open("wb") as file:
        for part in parts:
            start = file.tell()
            try:
                torch.save(read(part).view(_sizes(part)), file)
            except RuntimeError as error:  # torch hides what the file said behind what it makes of it
                raise error.__context__ if isinstance(error.__context__, OSError) else error from None
            begin_writing_out(file, start)
            places.append((start, file.tell() - start))
        os.fsync(file.fileno())
    return places


def file_name(number: int) -> str:
    """Name of a new checkpoint's file."""
    return f"__{number}_0.distcp"


def opened(directory: Path, files: Mapping[int, Mapping[Slab, Place]], dtype: torch.dtype) -> MegatronCheckpoint:
    """A checkpoint that has no index yet.

    Args:
        files: file's number -> where its slabs lie.
    """
    metadata, results = _index(files, dtype)
    metadata.storage_data = {result.index: result.storage_data for result in results}
    reader = FileSystemReader(directory)
    reader.set_up_storage_reader(metadata, is_coordinator=True)
    return MegatronCheckpoint(directory, metadata, reader)


def finish(directory: Path, files: Mapping[int, Mapping[Slab, Place]], dtype: torch.dtype) -> None:
    """Makes the files a checkpoint: writes the index and what megatron-core's loader looks for. Arguments as `opened`."""
    metadata, results = _index(files, dtype)
    torch.save({}, directory / _COMMON)
    writer = FileSystemWriter(directory, sync_files=True)
    writer.set_up_storage_writer(is_coordinator=True)
    writer.finish(metadata, [results])
    (directory / MARK).write_text(json.dumps(_MARK_CONTENT))


def _index(files: Mapping[int, Mapping[Slab, Place]], dtype: torch.dtype) -> tuple[Metadata, list[WriteResult]]:
    tensors: dict[str, TensorStorageMetadata] = {}
    results = []
    properties = TensorProperties(dtype=dtype)
    for number, places in files.items():
        for slab, (offset, length) in places.items():
            parameter, start = slab.parameter, torch.Size(start for start, _ in slab.box)
            held = TensorStorageMetadata(properties, torch.Size(parameter.global_shape), [])
            tensors.setdefault(parameter.key, held).chunks.append(ChunkStorageMetadata(start, _sizes(slab)))
            place = _StorageInfo(file_name(number), offset, length)
            results.append(WriteResult(MetadataIndex(parameter.key, start), length, place))
    return Metadata(dict(sorted(tensors.items()))), results


def _sizes(slab: Slab) -> torch.Size:
    """Of its box of the checkpoint's tensor."""
    return torch.Size(slab.box.shape)
