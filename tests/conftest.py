"""What all tests share."""

from __future__ import annotations

import os

# Before torch is imported: tests measure results, not speed, and several processes share few cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "disabled")

import pytest

SHARED_SERVERS = "tests/rollout/live/"


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log):
    """Which tests one worker takes: a file's; of a folder that shares servers, all."""
    from xdist.scheduler import LoadFileScheduling

    class ByServers(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            return SHARED_SERVERS if file.startswith(SHARED_SERVERS) else file

    return ByServers(config, log)
