"""The registry of transports: what each says of itself, what `rollout.transport` means, and a new one in a file of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.weight_transfer.receivers import check_crossing
from tulu_mega.config import RolloutSettings
from tulu_mega.errors import UserError
from tulu_mega.weight_transfer import transports
from tulu_mega.weight_transfer.transports import chosen, named, names

FIRST = ["shm", "gloo", "nccl", "ipc"]


@pytest.fixture
def first(monkeypatch) -> None:
    """A registry of the first four alone: messages list what there is."""
    monkeypatch.setattr(transports, "names", lambda: FIRST)


def test_each_file_is_a_transport_of_its_name():
    assert names()[:4] == FIRST
    assert [named(name).name for name in names()] == names()
    assert [name for name in FIRST if named(name).mapped] == ["shm", "ipc"]
    assert [name for name in FIRST if named(name).joins_gpu_once] == ["nccl"]


@pytest.mark.parametrize(
    ("device", "near", "name"),
    [("cpu", True, "shm"), ("cpu", False, "gloo"), ("cuda", True, "ipc"), ("cuda", False, "nccl")],
)
def test_auto_goes_by_where_parameters_and_servers_are(device, near, name):
    assert chosen("auto", device, near) is named(name)


@pytest.mark.parametrize(
    ("name", "device"), [("shm", "cpu"), ("shm", "cuda"), ("gloo", "cuda"), ("nccl", "cuda"), ("ipc", "cuda")]
)
def test_a_transport_that_can_be_is_taken_as_asked(name, device):
    assert chosen(name, device, near=True) is named(name)


@pytest.mark.parametrize("name", ["shm", "ipc"])
def test_memory_is_not_shared_between_hosts(first, name):
    with pytest.raises(UserError) as caught:
        chosen(name, "cuda", near=False)
    assert caught.value.problems == [
        f"rollout.transport = {name} shares memory, but some servers are on other hosts than the ranks that send; "
        "use gloo, nccl or auto"
    ]


@pytest.mark.parametrize("name", ["nccl", "ipc"])
def test_gpus_are_needed_where_buffers_lie_on_them(first, name):
    with pytest.raises(UserError) as caught:
        chosen(name, "cpu", near=True)
    assert caught.value.problems == [f"rollout.transport = {name} needs GPUs, this trainer has none; use shm, gloo or auto"]


def test_a_name_that_the_other_end_made_up_is_refused(first):
    with pytest.raises(UserError, match="transport 'os' is unknown here, expected one of shm, gloo, nccl, ipc"):
        named("os")


FILES = """
import os
from collections.abc import Mapping
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch
from torch import Tensor

from tulu_mega.weight_transfer.protocol import SLOTS
from tulu_mega.weight_transfer.transports import Endpoint, Transport


class Files(Transport):
    name = "files"
    device = "cpu"
    same_host = True
    mapped = True

    @staticmethod
    def outbox(capacity: int, device: torch.device, timeout_s: float) -> "FileOutbox":
        return FileOutbox(capacity)

    @staticmethod
    def inbox(endpoint: Mapping[str, Any], worker: int, device: torch.device, timeout_s: float) -> "FileInbox":
        return FileInbox(endpoint)


class FileOutbox:
    def __init__(self, capacity: int):
        self._folder = Path(mkdtemp())
        self._buffers = [torch.empty(capacity, dtype=torch.uint8) for _ in range(SLOTS)]

    def buffer(self, slot: int) -> Tensor:
        return self._buffers[slot]

    def endpoint(self, url: str, workers: int) -> Endpoint:
        return {"kind": "files", "folder": str(self._folder)}

    def connect(self, url: str) -> None:
        pass

    def filled(self, slot: int) -> None:
        (self._folder / str(slot)).write_bytes(self._buffers[slot].numpy().tobytes())

    def deliver(self, url: str, slot: int, nbytes: int) -> None:
        pass

    def drop(self, url: str) -> None:
        pass

    def close(self) -> None:
        for file in self._folder.iterdir():
            file.unlink()
        self._folder.rmdir()


class FileInbox:
    def __init__(self, endpoint: Mapping[str, Any]):
        self._folder = Path(endpoint["folder"])

    def receive(self, slot: int, nbytes: int) -> Tensor:
        return torch.frombuffer(bytearray((self._folder / str(slot)).read_bytes()), dtype=torch.uint8)[:nbytes]

    def close(self) -> None:
        pass
"""
SETTINGS = """
import sys
from tulu_mega.weight_transfer import transports
transports.__path__.append(sys.argv[1])
from tulu_mega.config import RolloutSettings, describe
assert RolloutSettings(transport="files").transport == "files"
(line,) = (row for row in describe(RolloutSettings) if row[0] == "transport")
assert "torch" not in sys.modules
print(line[1])
"""


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A folder of transports beside the package's, with one of them, as docs/how-to/add_a_transport.md says."""
    (tmp_path / "files.py").write_text(FILES)
    monkeypatch.setattr(transports, "__path__", [*transports.__path__, str(tmp_path)])
    yield tmp_path
    sys.modules.pop(f"{transports.__name__}.files", None)


def test_a_transport_is_one_file(folder):
    """Its bytes cross; messages, and what `auto` means, know of it."""
    assert "files" in names()
    check_crossing("files", folder=folder)
    assert chosen("auto", "cpu", near=True) is named("shm"), "auto takes those that say so alone"
    with pytest.raises(UserError, match="files shares memory"):
        chosen("files", "cpu", near=False)
    with pytest.raises(UserError, match=r"use shm, gloo, .*\bfiles\b"):
        chosen("nccl", "cpu", near=True)


def test_settings_know_a_transport_by_its_file_alone(folder):
    told = subprocess.run([sys.executable, "-c", SETTINGS, str(folder)], capture_output=True, text=True, timeout=60)
    assert told.stdout.startswith("auto | shm | gloo | nccl | ipc") and "files" in told.stdout.split(), told.stderr


def test_an_unknown_transport_is_refused_by_the_settings():
    with pytest.raises(ValueError, match="'auto', 'shm', 'gloo', 'nccl'"):
        RolloutSettings(transport="pigeon")
