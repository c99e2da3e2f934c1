"""What all tests share."""

from __future__ import annotations

import os

import pytest

# Before torch is imported: tests measure results, not speed, and several processes share few cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "disabled")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """With several processes of tests (`-n`, `--dist loadgroup`) a file stays in one of them, with what its tests share."""
    for item in items:
        together = item.path.parent if item.path.parent.name == "live" else item.path  # those share servers
        item.add_marker(pytest.mark.xdist_group(str(together)))
