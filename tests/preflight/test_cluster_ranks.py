"""`check --cluster` between two processes that stand for nodes: what one of them has otherwise is told by name."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path

import pytest

from tests.lib import world
from tulu_mega.config import SftSettings
from tulu_mega.errors import UserError
from tulu_mega.preflight import cluster

pytestmark = pytest.mark.ranks


def look(directory: Path, spoilt: bool, beside: str = "") -> int | list[str]:
    """The second node may have another learning rate, a clock that is ahead and a disk of its own.

    Args:
        beside: what the first process finds wrong by itself, which takes it longer than a node may take to answer.
    """
    rank = os.environ["RANK"]
    os.environ["LOCAL_RANK"] = "0"  # a node each
    own = spoilt and rank == "1"
    settings = SftSettings.model_validate(
        {
            "model": "nowhere",
            "run_dir": "run",
            "data": {"train": "x"},
            "optim": {"lr": 2e-5 if own else 1e-5},
        }
    )
    home = directory / rank if spoilt else directory
    home.mkdir(parents=True, exist_ok=True)
    os.chdir(home)
    now, tells = time.time, cluster._told

    def told(store, name: str, *of) -> list[str]:
        if name == "looked":
            patch.setattr(cluster, "PATIENCE", 1.0)
        return tells(store, name, *of)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cluster, "SEEN_SECONDS", 0.5)
        if own:
            patch.setattr(cluster.time, "time", lambda: now() + 30)
        try:
            if beside:
                patch.setattr(cluster, "_told", told)
            return cluster.check(settings, lambda: time.sleep(2.5) or [beside] if beside else [])
        except UserError as error:
            return error.problems


def test_nodes_that_go_together(tmp_path):
    assert world.run(2, look, tmp_path, False) == [2, 2]
    assert not list(tmp_path.rglob("*"))  # nothing is left behind


def test_what_the_first_finds_beside_is_told_by_all(tmp_path):
    assert world.run(2, look, tmp_path, False, "the data is not there") == [["the data is not there"]] * 2


def test_what_differs_is_named_on_every_process(tmp_path):
    first, second = world.run(2, look, tmp_path, True)
    assert first == second
    told = "\n".join(first)
    assert "(rank 1): setting optim.lr is 2e-05, elsewhere 1e-05" in told
    ahead = float(re.search(r"\(rank 1\): its clock is ([0-9.]+) s ahead of that of node", told)[1])
    assert ahead == pytest.approx(30, abs=10)  # a busy machine may take long between two looks at clocks
    assert told.count("is not seen there") == 2 and len(first) == 4
