"""Trainers under every layout give their weights to real vLLM servers, which then compute what the trainers compute."""

from __future__ import annotations

import itertools

import pytest
import torch
from safetensors.torch import load_file

from tests.lib import world
from tests.lib.layouts import LAYOUTS, size
from tests.weight_transfer.live import jobs
from tests.weight_transfer.live.servers import is_paused, one, weight_checksums
from tulu_mega.weight_transfer.control import ServerControl
from tulu_mega.weight_transfer.server import ServerFailure

pytestmark = [pytest.mark.alone, pytest.mark.servers]

pytest.importorskip("vllm")

FAMILIES = ["Llama", "OLMo 2", "Qwen 3"]
TRAINERS = ["TP2", "PP2", "TP2xPP2", "PP2xVPP2", "CP2", "DP2xTP2"]
PAIRWISE = [  # family, trainer, vLLM's tensor parallel size, transport
    ("Llama", "TP2xPP2", 2, "shm"),
    ("Llama", "PP2xVPP2", 2, "gloo"),
    ("Qwen 3", "PP2", 1, "gloo"),
    ("Qwen 3", "CP2", 1, "auto"),
    ("Qwen 3", "DP2xTP2", 1, "shm"),
]
"""Of two families, since each takes a server: the full grid has OLMo 2, too."""
GRID = list(itertools.product(FAMILIES, TRAINERS, (1, 2), ["shm", "gloo"]))
VERSIONS = itertools.count(1)


def arrived(server) -> list[dict[str, str]]:
    control = ServerControl(server.url, server.key, 60)
    sums = control.arrived_checksums()
    control.close()
    return sums


def check(models, servers, tmp_path, family, trainer, tensor, transport):
    """The server gets the weights that it has not: an update of what is there already proves nothing."""
    server = servers.get(models(family)[0], tensor)
    holds = arrived(server)[0]
    model = next(each for each in reversed(models(family)) if jobs.file_checksums(each) != holds)
    export, version = str(tmp_path / "export"), next(VERSIONS)
    layout, changes = LAYOUTS[trainer], {"transport": transport}
    ranks = world.run(size(layout), jobs.push, model, layout, [server], version, "fp32", export, changes)
    for report, difference in ranks:
        assert report.failed == {}
        assert report.version == version
        assert difference < 1e-4
    sums = arrived(server)
    assert len(sums) == tensor
    for each in sums:
        assert each == jobs.file_checksums(model) == jobs.file_checksums(export)


@pytest.mark.parametrize(("family", "trainer", "tensor", "transport"), PAIRWISE)
def test_vllm_computes_with_the_trainers_weights(models, servers, tmp_path, family, trainer, tensor, transport):
    check(models, servers, tmp_path, family, trainer, tensor, transport)


@pytest.mark.acceptance
@pytest.mark.parametrize(("family", "trainer", "tensor", "transport"), GRID)
def test_full_grid(models, servers, tmp_path, family, trainer, tensor, transport):
    check(models, servers, tmp_path, family, trainer, tensor, transport)


def test_small_buckets_and_narrow_wires(models, servers, tmp_path):
    """A trainer in bfloat16 and a server in float32: bfloat16 travels, in buckets that cut every layer in two."""
    first, other = models("Qwen 3")
    server = servers.get(first, 1)
    export = str(tmp_path / "export")
    ((report, _),) = world.run(1, jobs.push_in_small_buckets, other, [server], next(VERSIONS), "bf16", export)
    assert report.failed == {}
    assert arrived(server) == [jobs.file_checksums(export)]
    assert report.bytes == sum(tensor.nbytes for tensor in load_file(f"{export}/model.safetensors").values())
    assert {tensor.dtype for tensor in load_file(f"{export}/model.safetensors").values()} == {torch.bfloat16}
    ((report, difference),) = world.run(1, jobs.push_in_small_buckets, other, [server], next(VERSIONS), "fp32", None)
    assert report.failed == {}
    assert difference < 1e-4


def test_a_trainer_that_fails_says_so_on_every_rank_and_is_not_served(models, servers):
    first, other = models("Qwen 3")
    server = servers.get(first, 1)
    told = world.run(2, jobs.push_but_fail, other, LAYOUTS["PP2"], server, next(VERSIONS))
    assert told == [["rank 1: its weights could not be sent: no such memory"]] * 2
    control = ServerControl(server.url, server.key, 60)
    with pytest.raises(ServerFailure, match="could not be sent: no such memory"):
        control.resume()
    assert is_paused(control)
    control.close()
    ((report, difference),) = world.run(1, jobs.push, other, {}, [server], next(VERSIONS))
    assert report.failed == {}
    assert difference < 1e-4


@pytest.mark.acceptance
@pytest.mark.parametrize("tensor", [1, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_fresh_engine_on_the_export_has_the_same_checksums(models, servers, tmp_path, family, tensor):
    """vLLM's own, after its processing. On a CPU those of linear layers are of nothing."""
    first, other = models(family)
    server = servers.get(first, tensor)
    export = str(tmp_path / "export")
    world.run(2, jobs.push, other, LAYOUTS["TP2"], [server], next(VERSIONS), "fp32", export)
    sums = []
    with one(export, tmp_path / "fresh", tensor) as fresh:
        for address in (server, fresh):
            control = ServerControl(address.url, address.key, 60)
            sums.append(weight_checksums(control))
            control.close()
    updated, loaded = sums
    assert updated == loaded
    assert len(set(updated.values())) > 4  # of norms and embeddings


@pytest.mark.acceptance
def test_vllms_own_trainer_interface_drives_the_same(models, servers):
    first, other = models("Llama")
    server = servers.get(first, 2)
    version = 1
    ((name, told, report),) = world.run(1, jobs.push_through_vllm, other, server, version)
    assert name == "TrainerEngine"
    assert told == [list(pair) for pair in sorted(jobs.file_checksums(other).items())]
    assert report.failed == {}
    assert all(each == jobs.file_checksums(other) for each in arrived(server))


@pytest.mark.acceptance
def test_two_servers_take_the_same_buckets(models, servers):
    first, other = models("Qwen 3")
    both = [servers.get(first, tensor) for tensor in (1, 2)]
    ranks = world.run(2, jobs.push, other, LAYOUTS["PP2"], both, next(VERSIONS))
    for report, difference in ranks:
        assert report.failed == {}
        assert difference < 1e-4
