"""Large files are read by the ranks: each once, by one of those that see it; what nodes of their own have must be the same."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch.distributed as dist

from tests.lib import world
from tests.lib.pinned_inputs import flip
from tulu_mega.errors import UserError
from tulu_mega.pins import digest, directories, ranks
from tulu_mega.pins.directories import Directory
from tulu_mega.pins.record import Pin, Pins

pytestmark = pytest.mark.ranks
LARGE = {f"model-{at}.safetensors": 100 + at for at in range(4)}


def prepared(run_dir: Path, model: Path) -> None:
    """As the start leaves it that reads no large files."""
    pin = directories.pin(Directory(str(model)), None, limit=10)
    Pins({"model.path": Pin("model", pin.parts, True)}).write(run_dir)


def in_ranks(root: Path) -> list:
    """A world of two ranks through several starts."""
    dist.init_process_group("gloo")
    rank, told = dist.get_rank(), []
    digest.RACY = 0.0
    counted: list[str] = []
    ranks.read = lambda path: counted.append(path.name) or digest.read(path)

    def start(node: str, local_rank: int, accept: tuple[str, ...] = ()) -> None:
        os.chdir(root / node)
        counted.clear()
        try:
            ranks.settle(root / "run", accept, local_rank, lambda what: None)
            told.append(sorted(counted))
        except UserError as error:
            told.append(error.problems)

    def alone(work) -> None:
        dist.barrier()
        if rank == 0:
            work()
        dist.barrier()

    start("a", rank)  # one node
    start("a", rank)
    start("ab"[rank], 0)  # the second has a file system of its own
    start("ab"[rank], 0)
    alone(lambda: flip(root / "b/model/model-2.safetensors"))
    start("ab"[rank], 0)
    alone(lambda: flip(root / "a/model/model-1.safetensors"))
    start("a", rank)
    start("a", rank, ("model",))
    start("a", rank)
    alone(lambda: (root / "run/pins.json").unlink())
    start("a", rank)
    return told


def test_ranks_share_what_is_to_be_read(tmp_path):
    model = tmp_path / "a/model"
    model.mkdir(parents=True)
    (model / "config.json").write_text("{}")
    names = ", ".join(f'"{name}": "{name}"' for name in LARGE)
    (model / "model.safetensors.index.json").write_text(f'{{"weight_map": {{{names}}}}}')
    for name, size in LARGE.items():
        (model / name).write_bytes(bytes(range(size)))
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    prepared(tmp_path / "run", model)
    first, second = world.run(2, in_ranks, tmp_path, timeout=60)

    everything = sorted([*LARGE, "config.json", "model.safetensors.index.json"])
    read = first[0] + second[0]
    assert set(LARGE) <= set(read) and len(read) == len(set(read)) and first[0] and second[0]
    assert (first[1], second[1]) == ([], [])
    assert (first[2], second[2]) == ([], everything)
    assert (first[3], second[3]) == ([], [])
    assert first[4] == second[4] and "model-2.safetensors is not what it is on" in first[4][0]
    assert first[5] == second[5] and first[5][0].startswith("model.path = model: is not what run_dir = ")
    assert "model-1.safetensors (101 bytes)" in first[5][0] and "add --accept_changes model.path" in first[5][0]
    assert sorted(first[6] + second[6]) == ["model-1.safetensors"]
    assert (first[7], second[7]) == ([], [])
    assert (first[8], second[8]) == ([], [])
