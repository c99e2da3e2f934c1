"""A rank that hangs is named by the others, which then end."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest

from tests.lib import world
from tests.lib.sft_runs import EXAMPLE, arguments, run_sft
from tulu_mega.config import SftSettings, load
from tulu_mega.data.loader import PackedLoader
from tulu_mega.preflight import check
from tulu_mega.resilience import watchdog

pytestmark = pytest.mark.ranks

TIMEOUT = 3.0


def hang(settings: SftSettings, how: str, directory: Path) -> None:
    """Trains with two data-parallel ranks, of which the second hangs while it packs the third step."""
    rank = os.environ["RANK"]
    os.dup2(os.open(directory / f"rank_{rank}.log", os.O_WRONLY | os.O_CREAT, 0o644), 2)
    os.environ["TORCHELASTIC_ERROR_FILE"] = str(directory / f"rank_{rank}.json")
    packs, leave = PackedLoader.batches, os._exit

    def batches(loader: PackedLoader, at: int):
        if at == 2 and rank == "1":
            time.sleep(1)  # steps may be shorter than the time between two beats
            os.kill(os.getpid(), signal.SIGSTOP) if how == "stopped" else time.sleep(600)
        return packs(loader, at)

    def noted(status: int) -> None:
        (directory / f"rank_{rank}.status").write_text(str(status))
        time.sleep(2)  # the store is rank 0's here
        leave(status)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PackedLoader, "batches", batches)
        patch.setattr(watchdog.os, "_exit", noted)
        run_sft(settings)


@pytest.mark.parametrize("how", ["stopped", "asleep"])
def test_a_rank_that_hangs_is_named(material, tmp_path, how):
    flags = ["--watchdog.timeout", str(TIMEOUT), "--parallel.tensor", "1", "--parallel.data", "2"]
    settings = load(SftSettings, str(EXAMPLE), [*arguments(material, tmp_path / "run", 4, every=4)[1:], *flags])
    check.ready(settings)
    with pytest.raises(AssertionError, match="rank 0: ended without an answer"):
        world.run(2, hang, settings, how, tmp_path, timeout=120)
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
