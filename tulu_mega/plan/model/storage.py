"""How long a checkpoint takes to be written and read again."""

from __future__ import annotations

from dataclasses import dataclass

from tulu_mega.plan.model.job import Job

THREAD = 2e9
"""Bytes/s of a rank, which writes with one thread: an estimate; on CPUs it is about what one `cp` reaches there."""
_COPIED = 0.5
"""Share of the way to main memory that copies reach when all of a node's GPUs take it at once."""


@dataclass(frozen=True)
class Storage:
    """Of a run's checkpoints."""

    size: float
    """bytes of one"""
    save: float
    """seconds until it is written"""
    waits: float
    """seconds of these in which nothing is trained"""
    load: float
    """seconds until all ranks have read what they need"""

    def __add__(self, other: Storage) -> Storage:
        return Storage(self.size + other.size, self.save + other.save, self.waits + other.waits, self.load + other.load)


def storage(job: Job, rate: float, asynchronous: bool) -> Storage:
    """A checkpoint, of what trains: each rank writes its share of the optimizer's state, the first of the data-parallel ones the
    weights too. On going on all read their share and the weights.

    Args:
        rate: of the file system that all share, bytes/s.
        asynchronous: whether it is written from copies in main memory while training goes on.
    """
    parallel = job.parallel
    share = job.state_bytes / (job.shards if parallel.distributed_optimizer else 1)
    copies = parallel.tensor * (job.shards if parallel.distributed_optimizer else 1)
    size = sum(job.trained) * (share * copies + job.itemsize * parallel.tensor)
    fullest = max(job.trained) * (share + job.itemsize)
    save = max(size / rate, fullest / THREAD)
    read = sum(job.trained) * (share + job.itemsize) * parallel.tensor * job.shards
    return Storage(size, save, fullest / (_COPIED * job.gpu.host) if asynchronous else save, max(read / rate, fullest / THREAD))
