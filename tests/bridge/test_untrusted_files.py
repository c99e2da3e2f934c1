"""Hostile model directories and checkpoints: refused in a line, within bounded time; nothing of theirs runs."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from tulu_mega.bridge.files.config_json import read_config
from tulu_mega.bridge.files.hf_files import INDEX, SINGLE, HfCheckpoint
from tulu_mega.bridge.files.megatron_files import MegatronCheckpoint
from tulu_mega.bridge.files.megatron_index import read_index, screen
from tulu_mega.bridge.files.untrusted import open_plain
from tulu_mega.errors import UserError
from tulu_mega.outside.json_input import parse_json

DEEP = b"[" * 200_000


class Calls:
    """Runs a function when it is unpickled."""

    def __init__(self, function, *arguments):
        self._call = function, arguments

    def __reduce__(self):
        return self._call


def header(directory: Path, entries: object, size: int = 0) -> Path:
    """A directory with a safetensors file of this header."""
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text("{}")
    content = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    (directory / SINGLE).write_bytes(len(content).to_bytes(8, "little") + content + bytes(size))
    return directory


def entry(shape: object = (1,), offsets: object = (0, 4), dtype: object = "F32") -> dict:
    return {"t": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}


HEADERS = {
    "negative": entry((-1, -1)),
    "float": entry((1.0,)),
    "truth": entry((True,)),
    "beyond 2^63": entry((1 << 63,)),
    "thousands of digits": b'{"t": {"dtype": "F32", "shape": [1' + b"0" * 5000 + b'], "data_offsets": [0, 4]}}',
    "text": entry("11"),
    "shape missing": {"t": {"dtype": "F32", "data_offsets": [0, 4]}},
    "many dimensions": entry([1] * 100_000),
    "offsets negative": entry((1,), (-4, 0)),
    "offsets three": entry((1,), (0, 4, 8)),
    "offsets infinite": b'{"t": {"dtype": "F32", "shape": [1], "data_offsets": [0, Infinity]}}',
    "type no text": entry(dtype=["F32"]),
    "deep": DEEP,
    "a list": [1],
    "twice": b'{"t": %(t)b, "t": %(t)b}' % {b"t": b'{"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}'},
    "no UTF-8": b'{"\xff": 1}',
    "empty": b"",
}  # fmt: skip


@pytest.mark.parametrize("entries", HEADERS.values(), ids=HEADERS)
def test_a_header_out_of_bounds_is_refused(tmp_path, entries):
    start = time.monotonic()
    with pytest.raises(UserError) as refused:
        HfCheckpoint.open(header(tmp_path / "model", entries, 4))
    assert str(tmp_path / "model" / SINGLE) in str(refused.value) and len(str(refused.value)) < 1000
    assert time.monotonic() - start < 60


def test_a_header_within_bounds_is_read(tmp_path):
    assert HfCheckpoint.open(header(tmp_path / "model", entry(), 4)).tensors["t"].shape == (1,)


@pytest.mark.parametrize("name", ["config.json", INDEX, SINGLE])
@pytest.mark.parametrize("what", ["deep", "FIFO", "device", "directory"])
def test_what_is_no_plain_file_or_too_deep_is_refused(tmp_path, name, what):
    directory = header(tmp_path / "model", entry(), 4)
    (directory / name).unlink(missing_ok=True)
    if what == "deep":
        (directory / name).write_bytes(DEEP)
    elif what == "FIFO":
        os.mkfifo(directory / name)
    elif what == "device":
        (directory / name).symlink_to("/dev/zero")
    else:
        (directory / name).mkdir()
    with pytest.raises(UserError, match=name.replace(".", r"\.")):
        HfCheckpoint.open(directory)
    if name == "config.json":
        with pytest.raises(UserError, match="cannot be read"):
            read_config(directory)


def test_a_link_to_a_file_is_followed(tmp_path):
    """As the cache of huggingface_hub has them."""
    (tmp_path / "blob").write_bytes(b"{}")
    (tmp_path / "config.json").symlink_to(tmp_path / "blob")
    with open_plain(tmp_path / "config.json") as file:
        assert parse_json(file.read()) == {}


@given(st.binary(max_size=200))
def test_bytes_are_json_or_a_value_error(data):
    try:
        parse_json(data)
    except ValueError:
        return
    assert json.loads(data.decode()) is not None or data.strip() == b"null"


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    """A checkpoint of tensors and an object, as torch writes one."""
    from torch.distributed.checkpoint import save

    directory = tmp_path_factory.mktemp("checkpoint") / "sound"
    state = {"weight": torch.arange(6.0).view(2, 3), "rng": {"cpu": torch.get_rng_state(), "step": 3}}
    save(state, checkpoint_id=directory, no_dist=True)
    (directory / "metadata.json").write_text('{"sharded_backend": "torch_dist"}')
    return directory


@pytest.fixture
def copy(sound, tmp_path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "copy"))


def rewrite(directory: Path, change) -> None:
    """Changes the index as whoever made it could."""
    index = FileSystemReader(directory).read_metadata()
    change(index)
    (directory / ".metadata").write_bytes(pickle.dumps(index))


def test_an_index_is_read_as_torch_reads_it(sound):
    ours, theirs = read_index(sound), FileSystemReader(sound).read_metadata()
    assert ours.state_dict_metadata == theirs.state_dict_metadata and ours.storage_data == theirs.storage_data
    assert type(ours) is Metadata and isinstance(ours.state_dict_metadata["weight"], TensorStorageMetadata)
    screen(sound)
    assert MegatronCheckpoint.open(sound).tensors["weight"] == ((2, 3), torch.float32)


CALLS = {
    "system": Calls(os.system, "touch {}"),
    "eval": Calls(eval, "open('{}', 'w').close()"),
    "path": Calls(Path.touch, Path("{}")),
    "a class of torch": Calls(torch.load, "{}"),
    "a function of an allowed module": Calls(torch.serialization.load, "{}"),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("where", ["index", "within it", "object"])
def test_nothing_in_a_checkpoint_is_called(copy, tmp_path, call, where):
    mark = tmp_path / "mark"
    function, arguments = CALLS[call]._call
    evil = Calls(function, *(type(each)(str(each).format(mark)) for each in arguments))
    if where == "index":
        (copy / ".metadata").write_bytes(pickle.dumps(evil))
    elif where == "within it":
        rewrite(copy, lambda index: setattr(index, "planner_data", [evil]))
    else:
        file = copy / "object.distcp"
        torch.save({"cpu": evil}, file)

        def moved(index):
            (key,) = (key for key in index.storage_data if key.fqn.startswith("rng") and "step" in key.fqn)
            place = index.storage_data[key]
            place.relative_path, place.offset, place.length = file.name, 0, file.stat().st_size

        rewrite(copy, moved)
    with pytest.raises(UserError) as refused:
        screen(copy)
    assert str(copy) in str(refused.value) and not mark.exists()
    if where != "object":
        with pytest.raises(UserError, match="no part of an index"):
            MegatronCheckpoint.open(copy)
        assert not mark.exists()


CHANGES = {
    "a file elsewhere": lambda index: [setattr(each, "relative_path", "../x.distcp") for each in index.storage_data.values()],
    "an absolute file": lambda index: [setattr(each, "relative_path", "/dev/zero") for each in index.storage_data.values()],
    "a negative place": lambda index: [setattr(each, "offset", -1) for each in index.storage_data.values()],
    "a length of text": lambda index: [setattr(each, "length", "9") for each in index.storage_data.values()],
    "a part beyond its tensor": lambda index: setattr(index.state_dict_metadata["weight"], "size", torch.Size((1, 3))),
    "a type of text": lambda index: setattr(index.state_dict_metadata["weight"].properties, "dtype", "float32"),
    "a tensor of text": lambda index: index.state_dict_metadata.update(weight="text"),
    "no places": lambda index: setattr(index, "storage_data", None),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_an_index_out_of_bounds_is_refused(copy, change):
    rewrite(copy, change)
    with pytest.raises(UserError, match=r"\.metadata: cannot be read"):
        MegatronCheckpoint.open(copy)


@pytest.mark.parametrize(
    "content", [b"", b"\x80\x04.", b"\x80\x04K\x01.", b"cos\nsystem\n(S'true'\ntR.", b"\x80\x04" + b"(" * 50_000 + b"."]
)
def test_a_damaged_index_is_refused(copy, content):
    (copy / ".metadata").write_bytes(content)
    with pytest.raises(UserError, match=r"\.metadata: cannot be read"):
        MegatronCheckpoint.open(copy)


def test_an_index_that_is_a_fifo_is_refused(copy):
    (copy / ".metadata").unlink()
    os.mkfifo(copy / ".metadata")
    with pytest.raises(UserError, match="a FIFO"):
        MegatronCheckpoint.open(copy)
