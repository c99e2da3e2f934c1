"""Hugging Face model directories: what is in their safetensors files, and views into them.

Inspection reads headers only and needs no torch.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tulu_mega.bridge.box import Box
from tulu_mega.bridge.files.config_json import read_generation
from tulu_mega.bridge.files.untrusted import open_plain, read_json
from tulu_mega.bridge.rules import Shape
from tulu_mega.errors import UserError
from tulu_mega.outside.json_input import parse_json

if TYPE_CHECKING:
    from torch import Tensor

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_BYTES = {8: "F64 I64 U64 C64", 4: "F32 I32 U32", 2: "F16 BF16 I16 U16", 1: "I8 U8 BOOL F8_E4M3 F8_E5M2 F8_E8M0"}
_ITEM_BYTES = {dtype: size for size, dtypes in _BYTES.items() for dtype in dtypes.split()}
_LOADED = ("F32", "BF16", "F16")
_MAX_HEADER = 100_000_000  # the format's own limit
_LARGEST = 1 << 63
_MAX_DIMENSIONS = 64
_SHOWN = 20
_COMPARED = 1 << 24
"""Elements of two tensors that are held against one another at a time."""
_AGAIN = "download or export it again"


@dataclass(frozen=True)
class TensorInfo:
    """A tensor as a header describes it; ``dtype`` in safetensors' spelling (``BF16``, ``F32``...)."""

    dtype: str
    shape: Shape
    file: str = field(default="", compare=False)

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * _ITEM_BYTES[self.dtype]


@dataclass
class HfCheckpoint:
    """A model directory whose headers have been read and found sound."""

    path: Path
    config: dict[str, Any]
    tensors: dict[str, TensorInfo]
    asks: str = "config.json"
    """name of the file that says which tensors are to be there"""
    _open_files: dict[str, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def open(cls, path: str | os.PathLike) -> HfCheckpoint:
        """Reads config.json, the index and the headers of all shards.

        Raises:
            UserError: with everything that is wrong with the directory.
        """
        directory = Path(path)
        if not directory.is_dir():
            raise UserError(f"{directory}: no such directory; expected a Hugging Face model (config.json and *.safetensors)")
        problems: list[str] = []
        config = _read_json(directory / "config.json", problems)
        try:
            read_generation(directory)  # which goes with the trained model: it is too late for that when a run has ended
        except UserError as error:
            problems += error.problems
        problems += _two_models(directory)
        if (directory / INDEX).exists():
            tensors = _read_shards(directory, problems)
        elif (directory / SINGLE).exists():
            tensors = read_header(directory / SINGLE, problems)
            problems += _beside_single(directory, tensors)
        else:
            problems.append(_no_weights(directory))
        if problems:
            raise UserError(problems)
        return cls(directory, config, tensors)

    def check(self, expected: Mapping[str, Shape], ignore: Collection[str] = ()) -> list[str]:
        """What stands between these files and the tensors a model expects; empty when nothing does.

        Args:
            expected: name -> shape.
            ignore: shell patterns of tensors that may be there without being expected.
        """
        held, asks = self.tensors, self.asks
        missing = [name for name in expected if name not in held]
        extra = [name for name in held if name not in expected and not any(fnmatchcase(name, each) for each in ignore)]
        both = [name for name in expected if name in held]
        shaped = [name for name in both if held[name].shape != tuple(expected[name])]
        typed = [name for name in both if held[name].dtype not in _LOADED]
        at = {name: f"{self.path / info.file}: tensor {name}" for name, info in held.items()}
        return [
            *_first(f"{self.path}: tensor {name} is missing; {asks} asks for it" for name in missing),
            *_first(f"{at[name]} is left over; {asks} has no place for it" for name in extra),
            *_first(f"{at[name]} is {list(held[name].shape)}, {asks} asks for {list(expected[name])}" for name in shaped),
            *_first(f"{at[name]} is of type {held[name].dtype}, expected one of {', '.join(_LOADED)}" for name in typed),
        ]

    def check_tied(self, names: tuple[str, str] | None) -> list[str]:
        """What is wrong with two tensors that config.json says are one: both are there and differ. Then transformers keeps both.

        Args:
            names: theirs; None where no tensors are tied.
        """
        if names is None or not all(name in self.tensors for name in names):
            return []
        shapes = {self.tensors[name].shape for name in names}
        if len(shapes) == 1 and self._equal(*names, *shapes):
            return []
        one, other = names
        return [
            f"{self.path}: config.json says tie_word_embeddings = true, but {one} and {other} are there and differ; transformers "
            f"takes both then, others the former for both. Set it to false, or remove {other}"
        ]

    def _equal(self, one: str, other: str, shape: Shape) -> bool:
        rows = max(1, _COMPARED // max(1, prod(shape[1:])))
        rest = [(0, size) for size in shape[1:]]
        boxes = (Box(((start, min(start + rows, shape[0])), *rest)) for start in range(0, shape[0], rows))
        return all(bool((self.read_box(one, box) == self.read_box(other, box)).all()) for box in boxes)

    def read_box(self, name: str, box: Box) -> Tensor:
        """A box of a tensor as a torch view of the mapped file: nothing is read before it is used, nothing is copied.

        Args:
            name: a tensor of this checkpoint.
            box: of the tensor.
        """
        from safetensors import safe_open

        file = self.tensors[name].file
        if file not in self._open_files:
            self._open_files[file] = safe_open(self.path / file, framework="pt", device="cpu")
        mapped = self._open_files[file].get_slice(name)
        return mapped[box.slices]

    def close(self) -> None:
        """Release the mapped files (views keep theirs)."""
        self._open_files.clear()


def _first(messages: Iterable[str]) -> list[str]:
    """The first messages of a kind, and how many more there are."""
    told = list(messages)
    return told if len(told) <= _SHOWN else [*told[:_SHOWN], f"... and {len(told) - _SHOWN} more like the last"]


def _read_json(path: Path, problems: list[str]) -> dict[str, Any]:
    try:
        content = read_json(path)
    except FileNotFoundError:
        problems.append(f"{path}: no such file; expected a Hugging Face model directory")
    except (OSError, ValueError) as error:
        problems.append(f"{path}: cannot be read as JSON: {error}")
    else:
        if isinstance(content, dict):
            return content
        problems.append(f"{path}: holds {type(content).__name__}, expected a JSON object")
    return {}


def _no_weights(directory: Path) -> str:
    pickled = sorted(each.name for each in [*directory.glob("*.bin"), *directory.glob("*.pth"), *directory.glob("*.pt")])
    if pickled:
        return (
            f"{directory}: holds only pickled PyTorch weights ({pickled[0]}), which are not loaded; convert it first: "
            "AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW_DIR, safe_serialization=True)"
        )
    return f"{directory}: holds neither {INDEX} nor {SINGLE}; the download or export is not complete"


def _two_models(directory: Path) -> list[str]:
    """What makes it unclear which weights a directory means: transformers reads the single file, others the index."""
    single = (directory / SINGLE).exists()
    if parts := sorted(each.name for each in directory.glob("*.distcp")):
        return [
            f"{directory}: holds a model in Hugging Face's format and parts of a Megatron checkpoint ({parts[0]}); "
            "move away what is not meant"
        ]
    if not single or not (directory / INDEX).exists():
        return []
    try:
        named = set(read_json(directory / INDEX)["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []  # told of where the index is read
    if SINGLE in named:
        return []
    shards = f"{len(named)} other file{'s' if len(named) > 1 else ''}"
    return [
        f"{directory}: holds {SINGLE} and {INDEX}, which names {shards} and not it; transformers reads the former, others "
        f"the latter. Remove what is not meant: {SINGLE}, or {INDEX} and the files it names"
    ]


def _beside_single(directory: Path, tensors: Mapping[str, TensorInfo]) -> list[str]:
    """Files that hold tensors of the single file's once more, without an index to say which counts."""
    found = []
    for other in sorted(set(directory.glob("*.safetensors")) - {directory / SINGLE}):
        if both := tensors.keys() & read_header(other, []).keys():
            found.append(
                f"{other}: holds tensor {min(both)}, as {SINGLE} does, and no {INDEX} says which counts; vLLM reads all files, "
                f"transformers {SINGLE} alone. Remove what is not meant"
            )
    return found


def _read_shards(directory: Path, problems: list[str]) -> dict[str, TensorInfo]:
    """The tensors that the index names, from the headers of the files it names."""
    index = _read_json(directory / INDEX, problems)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict):
        if index:
            problems.append(f"{directory / INDEX}: has no weight_map; expected the file of every tensor; {_AGAIN}")
        return {}
    odd = [repr(file) for file in weight_map.values() if not isinstance(file, str) or Path(file).name != file]
    if odd:  # also "../elsewhere": nothing outside the directory is opened
        problems += _first(f"{directory / INDEX}: {file} is not the name of a file beside it" for file in odd)
        return {}
    tensors: dict[str, TensorInfo] = {}
    for file in sorted(set(weight_map.values())):
        before = len(problems)
        held = read_header(directory / file, problems)
        tensors.update({name: info for name, info in held.items() if weight_map.get(name) == file})
        if len(problems) == before:
            absent = [name for name, where in weight_map.items() if where == file and name not in held]
            problems += _first(f"{directory / file}: tensor {name} is not in it, though {INDEX} says so" for name in absent)
            twice = [name for name in held if weight_map.get(name, file) != file]
            problems += _first(
                f"{directory / file}: tensor {name} is in it, too, though {INDEX} says {weight_map[name]}; others read the last"
                for name in twice
            )
            unlisted = [name for name in held if name not in weight_map]
            problems += _first(f"{directory / file}: tensor {name} is in it, but not in {INDEX}" for name in unlisted)
    return tensors


def _naturals(values: Any, count: int | None = None) -> Shape:
    """Numbers of a header, none of them negative, a truth or larger than a file.

    Raises:
        ValueError: they are something else.
    """
    if type(values) is not list or not all(type(value) is int and 0 <= value < _LARGEST for value in values):
        raise ValueError(f"{str(values)[:60]} where whole numbers from 0 to 2^63 are expected")
    if len(values) > _MAX_DIMENSIONS if count is None else len(values) != count:
        raise ValueError(f"{len(values)} numbers where {count or f'at most {_MAX_DIMENSIONS}'} are expected")
    return tuple(values)


def read_header(path: Path, problems: list[str]) -> dict[str, TensorInfo]:
    """The tensors of one file, if its header is sound and the file as long as the header says.

    Args:
        problems: gets what is wrong with it.
    """
    try:
        with open_plain(path) as file:
            actual = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if actual < 8 or length > min(_MAX_HEADER, actual - 8):
                problems.append(f"{path}: {actual} bytes, too short for its header; the file is truncated or not safetensors")
                return {}
            entries = parse_json(file.read(length))
        entries.pop("__metadata__", None)
        tensors = {name: TensorInfo(entry["dtype"], _naturals(entry["shape"]), path.name) for name, entry in entries.items()}
        spans = sorted((*_naturals(entry["data_offsets"], 2), name) for name, entry in entries.items())
        end = 0
        for start, stop, name in spans:
            if type(tensors[name].dtype) is not str or tensors[name].dtype not in _ITEM_BYTES:
                problems.append(f"{path}: tensor {name} is of type {tensors[name].dtype}, expected one of {', '.join(_LOADED)}")
                return {}
            if start != end or stop - start != tensors[name].nbytes:
                problems.append(f"{path}: corrupt header: {name} does not fill its place in the file; {_AGAIN}")
                return {}
            end = stop
    except FileNotFoundError:
        problems.append(f"{path}: no such file, though {INDEX} names it; the download or export is not complete")
    except OSError as error:
        problems.append(f"{path}: cannot be read: {error}")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        problems.append(f"{path}: not a safetensors header ({error!r}); {_AGAIN}")
    else:
        if actual == 8 + length + end:
            return tensors
        wanted = 8 + length + end
        problems.append(f"{path}: {actual} bytes, its header asks for {wanted}; the file is truncated or damaged; {_AGAIN}")
    return {}
