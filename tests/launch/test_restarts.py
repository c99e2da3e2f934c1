"""A world that fails is started again, by the launcher, when the settings allow it."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import types
from pathlib import Path

import pytest

from tests.launch.test_launcher import wait_until, write_rank
from tulu_mega import platforms
from tulu_mega.config import ParallelSettings, PrecisionSettings
from tulu_mega.distributed import topology
from tulu_mega.errors import UserError
from tulu_mega.launch import launcher, reporting


def settings_of() -> types.SimpleNamespace:
    """What the launcher reads of a command's settings."""
    return types.SimpleNamespace(parallel=ParallelSettings(tensor=2), precision=PrecisionSettings())


@pytest.fixture
def start(tmp_path):
    """Runs a body as a world of two ranks that may be started again twice; the exit status and how often rank 0 was started."""

    def start(body: str, restarts: int = 2) -> tuple[int, int]:
        script = write_rank(tmp_path, f"open({str(tmp_path / 'starts')!r} + str(world.rank), 'a').write('.')\n" + body)
        around = {"run_dir": str(tmp_path / "run"), "restarts": restarts}
        status = launcher.run("the_recipe:run", settings_of(), [sys.executable, str(script)], lambda _: None, **around)
        return status, len((tmp_path / "starts0").read_text())

    return start


def test_a_rank_that_is_killed_once(start, tmp_path, capfd):
    status, starts = start(
        f"""
if len(open({str(tmp_path / "starts")!r} + str(world.rank)).read()) == 1:
    if world.rank == 1:
        time.sleep(600)
    while not os.path.exists({str(tmp_path / "starts1")!r}):  # its own first start, not its second, is to be cut short
        time.sleep(0.01)
    os.kill(os.getpid(), 9)
"""
    )
    assert (status, starts) == (0, 2)
    err = capfd.readouterr().err
    assert "rank 0 of 2 was killed" in err and "started again (1 of 2 times)" in err


def test_a_rank_that_fails_each_time(start):
    assert start("if world.rank == 0: raise RuntimeError('again')\ntime.sleep(600)") == (1, 3)


def test_no_second_try_unless_asked_for(start):
    assert start("if world.rank == 0: sys.exit(7)\ntime.sleep(600)", restarts=0) == (7, 1)


def test_what_the_user_can_mend_is_not_tried_again(start, capfd):
    assert start("if world.rank == 0: raise UserError('another setting')\ntime.sleep(600)") == (2, 1)
    assert "started again" not in capfd.readouterr().err


@pytest.mark.parametrize("shared", [False, True])
def test_ranks_find_the_servers_of_their_launcher(tmp_path, shared):
    """The launcher has the servers around the ranks, and waits for them only where they share a GPU with the ranks."""
    events = []

    class Pool:
        for_ranks = {"THE_KEY": "k"}

        def wait(self):
            events.append("servers ready")

        def __enter__(self):
            events.append("servers up")
            return self

        def __exit__(self, *_):
            events.append("servers down")

    def beside(settings, trainers):
        assert trainers == 2
        made = Pool()
        made.shared = shared
        return made

    body = f"open({str(tmp_path / 'key')!r} + str(world.rank), 'w').write(os.environ['THE_KEY'])"
    script = write_rank(tmp_path, body)
    around = {"run_dir": str(tmp_path / "run"), "companions": beside}
    program = [sys.executable, str(script)]
    assert launcher.run("the_recipe:run", settings_of(), program, lambda _: events.append("checked"), **around) == 0
    assert events == ["checked", "servers up", *["servers ready"] * shared, "servers down"]
    assert [(tmp_path / f"key{rank}").read_text() for rank in range(2)] == ["k", "k"] and "THE_KEY" not in os.environ


RANK = """
    import os, signal
    import torch, torch.distributed as dist
    dist.init_process_group("gloo")
    together = torch.ones(1)
    dist.all_reduce(together)
    assert together == 2
    if os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()
    open(f"DIRECTORY/met{os.environ['RANK']}", "w").write(os.environ["TORCHELASTIC_RESTART_COUNT"])
    dist.destroy_process_group()
"""


@pytest.mark.slow
def test_ranks_that_our_torchrun_starts_again_meet(tmp_path):
    """By a store of their own; in the one that torchrun shares they would find their predecessors' addresses."""
    (tmp_path / "rank.py").write_text(textwrap.dedent(RANK).replace("DIRECTORY", str(tmp_path)))
    command = [sys.executable, "-m", "tulu_mega.agent", "--standalone", "--nproc-per-node", "2", "--max-restarts", "1"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([*command, str(tmp_path / "rank.py")], env=env, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-4000:]
    assert [(tmp_path / f"met{rank}").read_text() for rank in range(2)] == ["1", "1"]


MENDABLE = """
    import os, sys, time
    from tulu_mega.launch import launcher, reporting
    reporting._TURN_SECONDS, reporting._AGENT_SECONDS = A_TURN, 600  # the agent may be slow to hear of it
    open(f"DIRECTORY/starts{os.environ['RANK']}", "a").write(".")
    while RANKS == "01" and not all(os.path.exists(f"DIRECTORY/starts{rank}") for rank in range(2)):
        time.sleep(0.01)
    if os.environ["RANK"] in RANKS:
        reporting.report(["the learning rate is a word; make it a number"])
        sys.exit(2)
    time.sleep(600)
"""


@pytest.mark.parametrize(("ranks", "told"), [("01", ""), ("0", ""), ("1", "[rank 1] ")], ids=["all", "the first", "the other"])
def test_what_the_user_can_mend_is_told_once_and_not_tried_again(tmp_path, ranks, told):
    turn = "600" if ranks == "01" else "0"  # the other one's turn does not come before the agent has heard the first
    words = {"DIRECTORY": str(tmp_path), "RANKS": repr(ranks), "A_TURN": turn}
    script = textwrap.dedent(MENDABLE)
    for name, word in words.items():
        script = script.replace(name, word)
    (tmp_path / "rank.py").write_text(script)
    command = [sys.executable, "-m", "tulu_mega.agent", "--standalone", "--nproc-per-node", "2", "--max-restarts", "2"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([*command, str(tmp_path / "rank.py")], env=env, capture_output=True, text=True, timeout=200)
    assert done.returncode == 2, done.stderr
    starts = [tmp_path / f"starts{rank}" for rank in range(2)]
    assert all(each.read_text() in ("", ".") for each in starts if each.exists())  # one may be ended before it came so far
    errors = [line for line in done.stderr.splitlines() if "error: " in line]
    assert errors == [f"{told}error: the learning rate is a word; make it a number"]


SLOW = """
    import os, signal, time
    signal.signal(signal.SIGTERM, lambda *_: None)
    open("DIRECTORY/ready", "w").close()
    end = time.monotonic() + 600
    while time.monotonic() < end:
        time.sleep(0.1)
"""


def test_an_agent_that_had_to_kill_its_ranks_does_not_say_that_they_saved(tmp_path):
    (tmp_path / "rank.py").write_text(textwrap.dedent(SLOW).replace("DIRECTORY", str(tmp_path)))
    command = [sys.executable, "-m", "tulu_mega.agent", "--standalone", "--nproc-per-node", "1", "--shutdown-timeout", "1"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    agent = subprocess.Popen([*command, str(tmp_path / "rank.py")], env=env, stderr=subprocess.PIPE, text=True)
    try:
        wait_until(lambda: agent.poll() is not None or (tmp_path / "ready").exists(), 120)
        agent.terminate()
        err = agent.communicate(timeout=120)[1]
    finally:
        agent.kill()
    assert agent.returncode == reporting.KILLED == 137, err
    assert "did not end within 1 s and were killed" in err and "GRACE" in err


def test_ranks_that_could_not_meet_say_why(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    with pytest.raises(UserError, match=r"restarted the ranks.*tulu_mega\.agent, or with TORCH_DISABLE"):
        topology.start(ParallelSettings(), platforms.install(), seed=0)
