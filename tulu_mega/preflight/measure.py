"""How fast the devices of a cluster compute and the links between its nodes carry, before a run; the slow ones are named.

Each device multiplies matrices of bf16. Then the ranks of each node exchange bytes with the ranks of the same place on other
nodes, one node after another, all pairs of a round at once: a rank that is slow with all of them has a bad port or cable, a pair
that is slow while both its ends are quick elsewhere has a bad way between them. At last all ranks sum a large tensor.
"""

from __future__ import annotations

import os
import socket
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.distributed as dist

ROUNDS = 15
"""Other nodes that a node exchanges bytes with, at most: 16 nodes meet all others."""
_REPEATS = 3
"""The quickest of so many counts: others use the network too."""


@dataclass(frozen=True)
class Scale:
    """What is measured on a kind of device, and what is slow there."""

    side: int
    """rows of the square matrices that are multiplied"""
    pair_bytes: int
    """sent in each direction of a pair"""
    sum_bytes: int
    """bytes of the tensor that all ranks sum"""
    slow: float
    """share of the median below which a link or a device is slow"""
    judges_products: bool
    """whether a slow product says something of the device: a CPU's depends on what else runs there"""


GPU = Scale(side=8192, pair_bytes=64 * 2**20, sum_bytes=256 * 2**20, slow=0.7, judges_products=True)
CPU = Scale(side=256, pair_bytes=2**20, sum_bytes=4 * 2**20, slow=0.3, judges_products=False)


@dataclass(frozen=True)
class Measured:
    """What one rank found."""

    rank: int
    node: int
    host: str
    cpus: int
    """number of CPUs that the process may use (`sched_getaffinity`)"""
    tflops: float
    """1e12 FLOP/s of a product of bf16"""
    links: dict[int, float] = field(default_factory=dict)
    """1e9 bytes/s in each direction at once, by the other rank"""
    whole: float = 0.0
    """1e9 bytes/s of each rank while all sum a tensor: what a ring over all of them carries"""

    @property
    def best(self) -> float:
        """Return the rate of the quickest of its links."""
        return max(self.links.values())

    @property
    def name(self) -> str:
        return f"rank {self.rank} of node {self.host}"


def rounds(nodes: int) -> list[list[tuple[int, int]]]:
    """Pairs of nodes, a list a round, in which each node is at most once: a tournament in which everybody meets everybody."""
    seats = list(range(nodes + nodes % 2))
    made = []
    for _ in range(min(len(seats) - 1, ROUNDS)):
        half = len(seats) // 2
        pairs = zip(seats[:half], reversed(seats[half:]), strict=True)
        made.append([(one, other) for one, other in pairs if max(one, other) < nodes])
        seats = [seats[0], seats[-1], *seats[1:-1]]
    return made


def measure(speakers: Sequence[int], rank: int, size: int, device: torch.device) -> list[Measured]:
    """Measure, in a process group of all ranks; a collective.

    Args:
        speakers: the first rank of each node, ascending.

    Returns:
        What every rank found, by rank; the same on each.
    """
    scale = GPU if device.type == "cuda" else CPU
    firsts = [*speakers, size]
    node = max(at for at, first in enumerate(speakers) if first <= rank)
    tflops = _product(scale.side, device)
    links: dict[int, float] = {}
    for pairs in rounds(len(speakers)):
        dist.barrier()
        for pair in pairs:
            if node in pair:
                other = pair[1 - pair.index(node)]
                partner = firsts[other] + rank - firsts[node]
                if partner < firsts[other + 1]:  # it has as many ranks
                    links[partner] = _exchange(scale.pair_bytes, partner, device)
    mine = Measured(
        rank, node, socket.gethostname(), len(os.sched_getaffinity(0)), tflops, links, _sum(scale.sum_bytes, size, device)
    )
    found: list[Measured] = [mine] * size
    dist.all_gather_object(found, mine)
    return agreed(found)


def agreed(found: Sequence[Measured]) -> list[Measured]:
    """The same with each link as its slower end saw it: who sends may be done when all is in a buffer of the system."""
    return [
        replace(each, links={other: min(rate, found[other].links[each.rank]) for other, rate in each.links.items()})
        for each in found
    ]


def slow(found: Sequence[Measured], scale: Scale) -> list[str]:
    """The devices and links that are slow, in words. Two of a kind cannot tell which of them is."""
    problems = []
    if scale.judges_products and len(found) > 2:
        usual = statistics.median(each.tflops for each in found)
        problems += [
            f"{each.name}: its device multiplies at {each.tflops:.3g} TFLOP/s, the median of all is {usual:.3g}; look at its "
            "clock, temperature and who else uses it"
            for each in found
            if each.tflops < scale.slow * usual
        ]
    linked = [each for each in found if each.links]
    if len(linked) < 3:
        return problems
    usual = statistics.median(each.best for each in linked)
    least = scale.slow * usual
    tired = {each.rank for each in linked if each.best < least}
    by_rank = {each.rank: each for each in linked}
    problems += [
        f"{by_rank[rank].name}: exchanges {by_rank[rank].best:.3g} GB/s with other nodes at best, the median of all is "
        f"{usual:.3g}; look at its network device, port and cable"
        for rank in sorted(tired)
    ]
    problems += [
        f"{each.name} and {by_rank[other].name}: exchange {rate:.3g} GB/s, each of them {least:.3g} or more with others; look at "
        "the way between them"
        for each in linked
        for other, rate in each.links.items()
        if each.rank < other and rate < least and not {each.rank, other} & tired
    ]
    return problems


def told(found: Sequence[Measured]) -> list[str]:
    """What was measured, a line a node and one of all."""
    lines = []
    for node in sorted({each.node for each in found}):
        ranks = [each for each in found if each.node == node]
        linked = [each.best for each in ranks if each.links]
        cpus = sorted({each.cpus for each in ranks})
        between = f", {_span(linked)} GB/s to other nodes" if linked else ""
        lines.append(
            f"node {ranks[0].host}: {len(ranks)} rank{'s' * (len(ranks) > 1)}, {' or '.join(map(str, cpus))} CPUs each, "
            f"{_span([each.tflops for each in ranks])} TFLOP/s of bf16{between}"
        )
    if len(found) > 1:
        lines.append(f"a sum over all {len(found)} ranks: {min(each.whole for each in found):.3g} GB/s a rank")
    return lines


def _span(values: Sequence[float]) -> str:
    low, high = f"{min(values):.3g}", f"{max(values):.3g}"
    return low if low == high else f"{low} to {high}"


def _product(side: int, device: torch.device) -> float:
    factor = torch.ones(side, side, dtype=torch.bfloat16, device=device)
    product = torch.empty_like(factor)
    torch.mm(factor, factor, out=product)  # picks and loads the kernel
    return 2 * side**3 / _quickest(lambda: torch.mm(factor, factor, out=product), device) / 1e12


def _exchange(size: int, partner: int, device: torch.device) -> float:
    outgoing, incoming = torch.zeros(size, dtype=torch.uint8, device=device), torch.empty(size, dtype=torch.uint8, device=device)

    def both_ways(count: int = size) -> None:
        work = [dist.P2POp(dist.isend, outgoing[:count], partner), dist.P2POp(dist.irecv, incoming[:count], partner)]
        for each in dist.batch_isend_irecv(work):
            each.wait()

    both_ways(1024)  # connects
    return size / _quickest(both_ways, device) / 1e9


def _sum(size: int, ranks: int, device: torch.device) -> float:
    if ranks == 1:
        return 0.0
    values = torch.zeros(size // 4, dtype=torch.float32, device=device)
    dist.all_reduce(values)
    return 2 * (ranks - 1) / ranks * size / _quickest(lambda: dist.all_reduce(values), device) / 1e9


def _quickest(work: Callable[[], object], device: torch.device) -> float:
    seconds = []
    for _ in range(_REPEATS):
        _settle(device)
        began = time.perf_counter()
        work()
        _settle(device)
        seconds.append(time.perf_counter() - began)
    return max(min(seconds), 1e-9)


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
