"""`check --cluster` measures: what is slow is named, and what is as fast as the others is not."""

from __future__ import annotations

import itertools
import os
import shutil
import socket
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.lib import world
from tests.lib.namespaces import Host
from tests.lib.switched_hosts import move_to, slow_down, switched
from tulu_mega.config import SftSettings
from tulu_mega.errors import UserError
from tulu_mega.preflight import cluster, measure
from tulu_mega.preflight.measure import CPU, GPU, Measured, agreed, rounds, slow, told


def ranks(nodes: int = 4, each: int = 2) -> list[Measured]:
    """All nodes have met; all is well."""
    size = nodes * each
    links = {rank: {other: 40.0 for other in range(rank % each, size, each) if other != rank} for rank in range(size)}
    return [Measured(rank, rank // each, f"n{rank // each}", 12, 600.0, links[rank], 90.0) for rank in range(size)]


def with_link(found: list[Measured], one: int, other: int, rate: float) -> None:
    for here, there in ((one, other), (other, one)):
        found[here] = replace(found[here], links={**found[here].links, there: rate})


@pytest.mark.parametrize("nodes", [1, 2, 3, 8, 15, 16])
def test_everybody_meets_everybody_once_and_nobody_twice_in_a_round(nodes):
    made = rounds(nodes)
    assert sorted(map(sorted, itertools.chain(*made))) == [list(pair) for pair in itertools.combinations(range(nodes), 2)]
    assert all(len(set(itertools.chain(*pairs))) == 2 * len(pairs) for pairs in made)


def test_a_link_is_what_its_slower_end_saw():
    found = ranks()
    found[0] = replace(found[0], links={**found[0].links, 4: 3.0})
    both = agreed(found)
    assert both[0].links[4] == both[4].links[0] == 3.0 and both[2].links[0] == both[3].links[1] == 40.0


def test_many_nodes_meet_some():
    made = rounds(129)
    assert len(made) == measure.ROUNDS and all(len(pairs) == 64 for pairs in made)


def test_what_is_alike_is_not_slow():
    found = ranks()
    found[3] = replace(found[3], tflops=600 * 0.71)
    with_link(found, 0, 2, 40 * 0.71)
    assert slow(found, GPU) == []
    assert slow(ranks(1), GPU) == slow(ranks(2, 1), GPU) == []
    assert told(found)[1] == "node n1: 2 ranks, 12 CPUs each, 426 to 600 TFLOP/s of bf16, 40 GB/s to other nodes"
    assert told(found)[-1] == "a sum over all 8 ranks: 90 GB/s a rank"
    assert told(ranks(1, 1)) == ["node n0: 1 rank, 12 CPUs each, 600 TFLOP/s of bf16"]


def test_a_slow_device_is_named_on_gpus():
    found = ranks()
    found[5] = replace(found[5], tflops=300.0)
    (problem,) = slow(found, GPU)
    assert problem.startswith("rank 5 of node n2: its device multiplies at 300 TFLOP/s, the median of all is 600; look at")
    assert slow(found, CPU) == []


def test_a_rank_that_is_slow_with_all_is_named_alone():
    found = ranks()
    for other in (0, 2, 4):
        with_link(found, 6, other, 11.0)
    (problem,) = slow(found, GPU)
    assert problem.startswith("rank 6 of node n3: exchanges 11 GB/s with other nodes at best, the median of all is 40; look at")


def test_a_slow_way_between_two_quick_ones_is_named():
    found = ranks()
    with_link(found, 1, 7, 5.0)
    (problem,) = slow(found, GPU)
    assert problem.startswith("rank 1 of node n0 and rank 7 of node n3: exchange 5 GB/s, each of them 28 or more with others")


def look(hosts: list[Host], directory: Path) -> tuple[list[str], list[str]]:
    """`check --cluster` on one of the hosts: what is wrong, and what was told."""
    rank = int(os.environ["RANK"])
    move_to(hosts[rank])
    os.environ |= {
        "LOCAL_RANK": "0", "MASTER_ADDR": hosts[0].address, "MASTER_PORT": "29571", "GLOO_SOCKET_IFNAME": "eth0",
        "TORCHELASTIC_USE_AGENT_STORE": "False",
    }  # fmt: skip
    torch.set_num_threads(1)
    os.chdir(directory)
    settings = SftSettings.model_validate({"model": "nowhere", "run_dir": "run", "data": {"train": "x"}})
    lines: list[str] = []
    try:
        cluster.check(settings, tell=lines.append)
        return [], lines
    except UserError as error:
        return error.problems, lines


@pytest.mark.ranks
@pytest.mark.skipif(not (shutil.which("ip") and shutil.which("tc")), reason="needs iproute2's ip and tc")
def test_a_link_that_was_slowed_down_is_named(tmp_path):
    with switched("tc", "10.213.9", 3) as hosts:
        slow_down(hosts[1], 200)
        found = world.run(3, look, hosts, tmp_path)
    (problem,), lines = found[0]
    assert all(each[0] == [problem] for each in found), "told on every process"
    assert problem.startswith(f"rank 1 of node {socket.gethostname()}: exchanges 0.0"), problem
    assert [line.split(":")[0].split(" ")[0] for line in lines] == ["node", "node", "node", "a"]
    assert f"{len(os.sched_getaffinity(0))} CPUs each" in lines[0] and "TFLOP/s of bf16" in lines[0]
