"""A run that is asked to end saves a step and ends; the same command goes on as if nothing had happened."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tests.launch.test_launcher import LAUNCHER, wait_until, write_rank
from tests.lib import world
from tests.lib.sft_runs import EXAMPLE, arguments, expect_same, run_sft, steps_done, undisturbed
from tulu_mega.config import SftSettings, load
from tulu_mega.data.loader import PackedLoader
from tulu_mega.errors import Stopped
from tulu_mega.preflight import check
from tulu_mega.train import checkpoint

pytestmark = pytest.mark.ranks

STEPS = 5


def asked(settings: SftSettings, rank: int, number: int, step: int) -> int:
    """Trains, and one rank gets a signal while it packs a step (from 0); the steps done when all have stopped."""
    packs = PackedLoader.batches

    def batches(loader: PackedLoader, at: int):
        if at == step and os.environ["RANK"] == str(rank):
            os.kill(os.getpid(), number)
        return packs(loader, at)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped) as caught:
        patch.setattr(PackedLoader, "batches", batches)
        run_sft(settings)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    return caught.value.step


def test_any_rank_that_is_asked_ends_all_after_the_same_step(material, tmp_path):
    undisturbed(material, tmp_path / "reference", STEPS, every=4)
    run_dir = tmp_path / "run"
    settings = load(SftSettings, str(EXAMPLE), arguments(material, run_dir, STEPS, every=4)[1:])
    check.ready(settings)
    assert world.run(2, asked, settings, 1, signal.SIGTERM, 1) == [2, 2]
    assert [found.step for found in checkpoint.find(run_dir / "checkpoints")] == [2] and not (run_dir / "hf").exists()
    assert world.run(2, asked, settings, 0, signal.SIGUSR1, 3) == [4, 4]  # where a checkpoint is due anyway
    assert world.run(2, asked, settings, 0, signal.SIGUSR1, 4) == [5, 5]  # the last step: the export is for the next start
    assert not (run_dir / "hf").exists() and steps_done(run_dir) == STEPS
    world.run(2, run_sft, settings)
    expect_same(run_dir, tmp_path / "reference")


SAVES = """
    import signal
    from tulu_mega.errors import Stopped
    asked = []
    signal.signal(signal.SIGTERM, lambda *_: asked.append(1)); signal.signal(signal.SIGUSR1, lambda *_: asked.append(1))
    open(f'DIRECTORY/ready{world.rank}', 'w').close()
    while not asked:
        time.sleep(0.05)
    time.sleep(SECONDS)
    open(f'DIRECTORY/saved{world.rank}', 'w').close()
    reporting.report_stop(stopped := Stopped(7))
    sys.exit(stopped.status)
"""
ASKED = LAUNCHER.replace("lambda settings: None)", "lambda settings: None, run_dir=sys.argv[2], grace=float(sys.argv[3]))")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="prctl")
@pytest.mark.parametrize(
    ("to", "number", "seconds", "grace"),
    [
        ("launcher", "SIGUSR1", 0.5, 60),
        ("rank", "SIGTERM", 0.5, 60),
        ("launcher", "SIGTERM", 600, 1),
    ],
    ids=["SIGUSR1", "to a rank alone", "too slow"],
)
def test_the_launcher_leaves_its_ranks_time_to_save(tmp_path, to, number, seconds, grace):
    body = SAVES.replace("DIRECTORY", str(tmp_path)).replace("SECONDS", str(seconds))
    if to == "rank":  # rank 0 alone notes it and all end, as ranks do that agree
        body = body.replace("while not asked", f"while not os.path.exists('{tmp_path}/saved0') if world.rank else not asked")
    script = write_rank(tmp_path, f"open(f'{tmp_path}/pid{{world.rank}}', 'w').write(str(os.getpid()))\n" + textwrap.dedent(body))
    (tmp_path / "launch.py").write_text(textwrap.dedent(ASKED))
    command = [sys.executable, str(tmp_path / "launch.py"), str(script), str(tmp_path / "run"), str(grace)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        wait_until(lambda: process.poll() is not None or all((tmp_path / f"ready{rank}").exists() for rank in range(2)), 90)
        if to == "launcher":
            process.send_signal(getattr(signal, number))
        else:
            os.kill(int((tmp_path / "pid0").read_text()), getattr(signal, number))
        err = process.communicate(timeout=120)[1]
    finally:
        process.kill()
    assert process.returncode == (143 if grace > seconds else 137), err
    saved = [(tmp_path / f"saved{rank}").exists() for rank in range(2)]
    if grace > seconds:
        assert saved == [True, True] and err == f"{Stopped(7)}\n"
    else:
        assert saved == [False, False] and "did not end within 1 s and were killed" in err


def test_one_rank_of_each_node_asks_a_foreign_torchrun(monkeypatch, tmp_path):
    """torchrun would start again what ends so: it is asked, too, where it was not."""
    killed = []
    monkeypatch.setattr(os, "kill", lambda *arguments: killed.append(arguments))
    from tulu_mega.launch import reporting

    monkeypatch.setattr(reporting, "_AGENT_SECONDS", 0.0)
    for rank, local in (("0", "0"), ("1", "1"), ("2", "0")):
        for name, value in {"RANK": rank, "LOCAL_RANK": local, "TORCHELASTIC_RUN_ID": "x"}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / f"{rank}.json"))
        reporting.report_stop(Stopped(3))
        assert '"stopped": 3' in Path(tmp_path / f"{rank}.json").read_text()
    assert killed == [(os.getppid(), signal.SIGTERM)] * 2
