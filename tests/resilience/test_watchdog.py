"""A rank that hangs is named by the others, which then end."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest

from tests.launch.test_launcher import wait_until
from tests.lib import world
from tests.lib.sft_runs import EXAMPLE, arguments, run_sft
from tulu_mega.config import SftSettings, load
from tulu_mega.data.loader import PackedLoader
from tulu_mega.preflight import check
from tulu_mega.resilience import watchdog
from tulu_mega.resilience.hang_report import Account
from tulu_mega.resilience.watchdog import Watchdog

pytestmark = pytest.mark.ranks

TIMEOUT = 3.0
"""For the step in which a rank hangs; what comes before may take its time on a busy machine."""


def hang(settings: SftSettings, how: str, directory: Path) -> None:
    """Trains with two data-parallel ranks, of which the second hangs while it packs the third step."""
    rank = os.environ["RANK"]
    os.dup2(os.open(directory / f"rank_{rank}.log", os.O_WRONLY | os.O_CREAT, 0o644), 2)
    os.environ["TORCHELASTIC_ERROR_FILE"] = str(directory / f"rank_{rank}.json")
    packs, leave, makes, gathers = PackedLoader.batches, os._exit, Watchdog.__init__, Watchdog._gathered
    watches = []

    def make(watch: Watchdog, timeout: float) -> None:
        makes(watch, timeout)
        watch._timeout = 600.0
        watches.append(watch)

    def batches(loader: PackedLoader, at: int):
        if at == 2:
            watches[0]._timeout = TIMEOUT
            if rank == "1":
                time.sleep(1)  # steps may be shorter than the time between two beats
                os.kill(os.getpid(), signal.SIGSTOP) if how == "stopped" else time.sleep(600)
        return packs(loader, at)

    def gathered(watch: Watchdog, stuck: Account) -> list[str]:
        if how == "asleep":  # a rank that runs may take long to say what it does
            watch._interval = 8.0
        return gathers(watch, stuck)

    def noted(status: int) -> None:
        (directory / f"rank_{rank}.status").write_text(str(status))
        if how == "asleep":  # whoever ends first may take the store along
            wait_until((directory / f"rank_{1 - int(rank)}.status").exists, 60)
        leave(status)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PackedLoader, "batches", batches)
        patch.setattr(Watchdog, "__init__", make)
        patch.setattr(Watchdog, "_gathered", gathered)
        patch.setattr(watchdog.os, "_exit", noted)
        run_sft(settings)


@pytest.mark.parametrize("how", ["stopped", "asleep"])
def test_a_rank_that_hangs_is_named(material, tmp_path, how):
    flags = ["--watchdog.timeout", str(TIMEOUT), "--parallel.tensor", "1", "--parallel.data", "2"]
    settings = load(SftSettings, str(EXAMPLE), [*arguments(material, tmp_path / "run", 4, every=4)[1:], *flags])
    check.ready(settings)
    world.Started(2, hang, settings, how, tmp_path).end_of(0, 240)
    log = (tmp_path / "rank_0.log").read_text()
    said = [line for line in log.splitlines() if line.startswith("watchdog: rank 0: ")]
    assert "no progress for" in said[0] and "(watchdog.timeout = 3)" in said[0] and "'step 3: " in said[0]
    assert "Current thread" in log and "in _losses" in log  # every thread's stack, the main one's within the engine
    assert (tmp_path / "rank_0.status").read_text() == str(watchdog.STATUS)
    assert "the run hung" in json.loads((tmp_path / "rank_0.json").read_text())["message"]["message"]
    if how == "stopped":
        assert "rank 1 does not answer: stopped, swapped out or dead; last heard of in 'step " in said[1]
        assert not (tmp_path / "rank_1.status").exists()
    else:
        assert "rank 1: in 'step 3: data', in no collective but in batches (" in log
        assert (tmp_path / "rank_1.status").read_text() == str(watchdog.STATUS)
    assert "rank 1 has not come to gloo:" in log and "of ranks 0-1, where rank 0 waits" in log
    assert ", called from tulu_mega/train/finalize.py:" in log
