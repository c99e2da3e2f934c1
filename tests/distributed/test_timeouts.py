"""How long collectives may take."""

from __future__ import annotations

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from tests.lib import world
from tulu_mega import platforms
from tulu_mega.config import ParallelSettings
from tulu_mega.distributed import topology

pytestmark = pytest.mark.ranks


def timeouts(seconds: float) -> list[float]:
    """Seconds, of the world and of the groups in it."""
    place = topology.start(ParallelSettings(tensor=2), platforms.install(), seed=0, timeout=timedelta(seconds=seconds))
    groups = (dist.group.WORLD, place.tensor_group, place.pipeline_group, place.data_context_group)
    found = [group._get_backend(torch.device("cpu")).options._timeout.total_seconds() for group in groups]
    topology.stop()
    return found


def test_groups_wait_as_long_as_the_world():
    assert world.run(2, timeouts, 5430.0) == [[5430.0, 5460.0, 5460.0, 5460.0]] * 2
