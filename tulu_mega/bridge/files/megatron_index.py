"""The index of a distributed checkpoint, `.metadata`, read without running what it says.

torch pickles the index, and a pickle may call any function. Here it makes objects of the classes that an index consists of, and
of no other; what comes out is checked to be an index. Objects beside the tensors (random states, states of FP8 layers) are
pickles within the data files, which torch loads as such: `screen` reads them once by its allow-list before anybody else does.
"""

from __future__ import annotations

import io
import os
import pathlib
import pickle
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import filesystem
from torch.distributed.checkpoint import metadata as parts
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex, TensorStorageMetadata

from tulu_mega.bridge.files.untrusted import open_plain
from tulu_mega.errors import UserError

INDEX = ".metadata"
MAX_BYTES = 4 << 30
"""Most bytes of an index. One of 405B parameters saved by a thousand ranks has some hundred megabytes."""
_MAX_OBJECT = 1 << 30
_AGAIN = "convert or save it again"
_PARTS = (
    "Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata", "TensorProperties", "MetadataIndex",
    "StorageMeta", "_MEM_FORMAT_ENCODING",
)  # fmt: skip
_CLASSES: dict[tuple[str, str], Any] = {
    **{("torch.distributed.checkpoint.metadata", name): getattr(parts, name) for name in _PARTS},
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): filesystem._StorageInfo,
    ("torch.serialization", "_get_layout"): lambda name: _value(torch.layout, str(name)),
    ("torch", "Size"): torch.Size,
    ("collections", "OrderedDict"): OrderedDict,
    **{("pathlib", name): pathlib.PurePosixPath for name in ("PosixPath", "PurePosixPath", "Path")},
}
"""Module and name, as pickled, of what an index may consist of -> what is made of it."""
_VALUES = (torch.dtype, torch.layout, torch.memory_format)


def _value(kind: type | tuple[type, ...], name: str) -> Any:
    """A type, layout or memory format by its name: `float32`, `torch.strided`."""
    found = getattr(torch, name.removeprefix("torch."), None)
    if not isinstance(found, kind):
        raise pickle.UnpicklingError(f"it asks for torch.{name}, which is no part of an index")
    return found


class _Unpickler(pickle.Unpickler):
    """Makes what an index consists of, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _CLASSES:
            return _CLASSES[module, name]
        if module == "torch":
            return _value(_VALUES, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is no part of an index and is not called")

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError("it refers to an object outside of itself")


def read_index(directory: Path) -> Metadata:
    """The index of a distributed checkpoint.

    Raises:
        UserError: there is none, it asks for something that is no part of an index, or it is damaged.
    """
    path = directory / INDEX
    try:
        with open_plain(path) as file:
            size = os.fstat(file.fileno()).st_size
            if size > MAX_BYTES:
                raise ValueError(f"it has {size} bytes, at most {MAX_BYTES} are read")
            found = _Unpickler(file).load()
        _check(found)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; the checkpoint is not complete; {_AGAIN}") from None
    except Exception as error:  # whatever unpickling a damaged file comes to
        raise UserError(f"{path}: cannot be read ({error}); {_AGAIN}") from None
    return found


def screen(directory: Path) -> None:
    """Makes sure that torch's loading of a checkpoint runs no code of its own: reads its index and every object in its files.

    Transformer Engine unpickles the bytes in its layers' ``_extra_state`` itself: go on with FP8 only from checkpoints that you
    trust.

    Raises:
        UserError: it does, or is damaged.
    """
    index = read_index(directory)
    for key, place in index.storage_data.items():
        if not isinstance(index.state_dict_metadata[key.fqn], BytesStorageMetadata):
            continue
        path = directory / place.relative_path
        try:
            if place.length > _MAX_OBJECT:
                raise ValueError(f"it has {place.length} bytes, at most {_MAX_OBJECT} are read")
            with open_plain(path) as file:
                file.seek(place.offset)
                held = file.read(place.length)
            with torch.serialization.safe_globals([io.BytesIO]):
                torch.load(io.BytesIO(held), map_location="meta", weights_only=True)
        except Exception as error:
            reason = next(iter(str(error).splitlines()), "").partition(". ")[0][:200] or repr(error)  # torch goes on to advise
            raise UserError(f"{path}: object {key.fqn} is not loaded ({reason}); {_AGAIN}") from None


def _check(found: Any) -> None:
    """
    Raises:
        ValueError: it is no index.
    """
    if type(found) is not Metadata:
        raise ValueError(f"it holds {type(found).__name__}, expected an index of tensors")
    held, places = found.state_dict_metadata, found.storage_data
    if not isinstance(held, Mapping) or not isinstance(places, Mapping):
        raise ValueError("it has no tensors or no places of theirs")
    for key, each in held.items():
        if type(key) is not str or not isinstance(each, TensorStorageMetadata | BytesStorageMetadata):
            raise ValueError(f"entry {str(key)[:100]!r} is neither a tensor nor an object")
        if isinstance(each, TensorStorageMetadata):
            _check_tensor(key, each)
    for index, place in places.items():
        if type(index) is not MetadataIndex or index.fqn not in held or type(place) is not filesystem._StorageInfo:
            raise ValueError(f"the place of {str(getattr(index, 'fqn', index))[:100]!r} is none of a tensor or object")
        file = place.relative_path
        if type(file) is not str or file != os.path.basename(file) or file in ("", ".", ".."):
            raise ValueError(f"{index.fqn} lies in {str(file)[:100]!r}, which is no file beside the index")
        if not (_natural(place.offset) and _natural(place.length)) or getattr(place, "transform_descriptors", None):
            raise ValueError(f"{index.fqn} lies at {place.offset!r} with {place.length!r} bytes, expected two numbers")


def _check_tensor(key: str, each: TensorStorageMetadata) -> None:
    if not isinstance(each.properties.dtype, torch.dtype) or not all(map(_natural, each.size)):
        raise ValueError(f"tensor {key} has type {each.properties.dtype!r} and shape {list(each.size)!r}")
    for chunk in each.chunks:
        inside = len(chunk.offsets) == len(chunk.sizes) == len(each.size) and all(
            _natural(start) and _natural(size) and start + size <= whole
            for start, size, whole in zip(chunk.offsets, chunk.sizes, each.size, strict=True)
        )
        if not inside:
            raise ValueError(f"tensor {key} of {list(each.size)} has a part of {list(chunk.sizes)} at {list(chunk.offsets)}")


def _natural(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 63
