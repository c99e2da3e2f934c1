"""The launcher with ranks of the tests' own: real processes, the real store, no model."""

from __future__ import annotations

import os
import pty
import shlex
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from unittest import mock

import pytest

from tulu_mega import cli
from tulu_mega.config import ParallelSettings, ScoreSettings, SftSettings
from tulu_mega.errors import HUNG, UserError
from tulu_mega.launch import launcher, ranks, reporting, run_dir

# A rank: what `python -m tulu_mega COMMAND` does, with a target of the test's own.
RANK = """
    import os, sys, time
    from tulu_mega.launch import launcher, reporting
    from tulu_mega.errors import UserError
    launcher.die_with_launcher()
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "x")  # else torch is loaded, to be asked whether there is CUDA
    rank = int(os.environ["RANK"])

    def recipe(settings, world):
        BODY

    import types
    module = types.ModuleType("the_recipe"); module.run = recipe; sys.modules["the_recipe"] = module
    sys.modules["tulu_mega.platforms"] = types.SimpleNamespace(prepare_imports=lambda: None)  # this recipe needs no megatron-core
    from tulu_mega.config import EngineSettings
    settings = EngineSettings.model_validate({"model": "m", "parallel": {"tensor": 2}})
    try:
        sys.exit(launcher.run("the_recipe:run", settings, [], prepare=None))
    except UserError as error:
        reporting.report(error.problems)
        sys.exit(2)
    except Exception as error:
        reporting.record_crash(error)
        raise
"""


@pytest.fixture
def start(tmp_path):
    """Runs a recipe's body as a world of two ranks and returns the exit status."""

    def start(body: str, keep_logs: bool = True) -> int:
        script = write_rank(tmp_path, body)
        parallel = {"tensor": 2}
        if keep_logs:
            settings = SftSettings.model_validate(
                {"model": "unused", "run_dir": str(tmp_path / "run"), "data": {"train": "unused"}, "parallel": parallel}
            )
        else:
            settings = ScoreSettings.model_validate({"model": "unused", "input": "i", "output": "o", "parallel": parallel})
        prepared = []
        run_dir = str(tmp_path / "run") if keep_logs else None
        status = launcher.run("the_recipe:run", settings, [sys.executable, str(script)], prepared.append, run_dir=run_dir)
        assert prepared == [settings]  # once, here
        return status

    return start


def write_rank(directory: Path, body: str) -> Path:
    script = directory / "rank.py"
    lines = textwrap.dedent(body).strip()
    script.write_text(textwrap.dedent(RANK).replace("    BODY", textwrap.indent(lines, "    ")))
    return script


def test_ranks_meet_over_loopback(start, tmp_path, capfd):
    status = start("""
        import torch, torch.distributed as dist
        dist.init_process_group("gloo")
        total = torch.tensor([world.rank + 1.0])
        dist.all_reduce(total)
        assert total.item() == 3.0
        print(f"rank {world.rank} of {world.size}, DP {world.data_parallel}, threads {os.environ['OMP_NUM_THREADS']}")
        dist.barrier()
        dist.destroy_process_group()
    """)
    assert status == 0
    assert "rank 0 of 2, DP 1, threads 1" in capfd.readouterr().out
    assert "rank 1 of 2" in (tmp_path / "run/logs/rank_1.stdout.log").read_text()


def test_a_crash_names_the_rank_and_shows_its_last_lines(start, capfd):
    status = start("""
        if world.rank == 1:
            raise RuntimeError("the second rank fell over")
        time.sleep(600)
    """)
    err = capfd.readouterr().err
    assert status == 1
    assert "rank 1 of 2 failed with exit status 1" in err
    assert "the second rank fell over" in err
    assert "torch.distributed.elastic" not in err and len(err.splitlines()) < 30


def test_logs_of_a_command_without_run_dir_are_shown_when_it_fails(start, capfd):
    assert start("print('nearly there'); sys.exit(7 if world.rank else 0)", keep_logs=False) == 7
    err = capfd.readouterr().err
    assert "exit status 7" in err and "nearly there" in err and "/tmp" not in err


def test_a_user_error_on_every_rank_is_told_once(start, capfd):
    assert start("raise UserError(['data: first', 'data: second'])") == 2
    err = capfd.readouterr().err
    assert err == "error: data: first\nerror: data: second\n"


def test_a_user_error_on_a_later_rank_is_told(start, capfd):
    body = """
        if world.rank == 1:
            raise UserError("only rank 1 saw this")
        time.sleep(600)
    """
    assert start(body) == 2
    assert capfd.readouterr().err == "error: only rank 1 saw this\n"


def test_a_killed_rank(start, capfd):
    status = start("os.kill(os.getpid(), 9) if world.rank == 1 else time.sleep(600)")
    assert status == 128 + signal.SIGKILL
    assert "rank 1 of 2 was killed" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("codes", "times", "first"),
    [
        ({0: HUNG, 1: -signal.SIGKILL}, {}, 0),  # rank 1 was stopped, and killed because it did not react to SIGTERM
        ({0: -signal.SIGTERM, 1: HUNG, 2: HUNG}, {1: 5.0, 2: 4.0}, 2),
        ({0: 1, 1: -signal.SIGKILL}, {0: 1.0}, 1),
        ({0: 1, 1: -signal.SIGTERM, 2: 1}, {0: 2.0, 2: 1.0}, 2),
    ],
)
def test_the_rank_that_failed_first(codes, times, first):
    assert ranks._first_failure(codes, {rank: {"time": times[rank]} if rank in times else {} for rank in codes}) == first


def test_a_rank_that_its_watchdog_ended_is_told_with_its_status(start, capfd):
    assert start("os._exit(124) if world.rank == 0 else time.sleep(600)") == HUNG
    assert "rank 0 of 2 made no progress and was ended (status 124)" in capfd.readouterr().err


LAUNCHER = """
    import sys
    from tulu_mega.launch import launcher, reporting
    from tulu_mega.config import ScoreSettings
    settings = ScoreSettings.model_validate({"model": "unused", "input": "i", "output": "o", "parallel": {"tensor": 2}})
    if __name__ == "__main__":
        sys.exit(launcher.run("the_recipe:run", settings, [sys.executable, sys.argv[1]], lambda settings: None))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="prctl")
@pytest.mark.parametrize(
    ("number", "status", "told"),
    [
        (signal.SIGKILL, -signal.SIGKILL, ""),
        (signal.SIGTERM, 128 + signal.SIGTERM, "asked to end: no finished step was unsaved"),  # before the first step
        (signal.SIGINT, 128 + signal.SIGINT, "interrupted: nothing is kept"),
        (signal.SIGHUP, 128 + signal.SIGTERM, "SIGHUP, the terminal was closed: the run is asked to end"),  # as by SIGTERM
    ],
    ids=lambda value: value.name if isinstance(value, signal.Signals) else None,
)
def test_ranks_die_with_the_launcher(tmp_path, number, status, told):
    """Also where a signal comes again at once: two of a terminal that closes, or an impatient Ctrl-C. What is lost is said."""
    script = write_rank(tmp_path, f"open(f'{tmp_path}/pid{{world.rank}}', 'w').write(f'{{os.getpid()}}.'); time.sleep(600)")
    (tmp_path / "launch.py").write_text(textwrap.dedent(LAUNCHER))
    words = [sys.executable, str(tmp_path / "launch.py"), str(script)]
    with (said := tmp_path / "said").open("w") as errors:
        process = subprocess.Popen(words, preexec_fn=as_from_a_terminal, stderr=errors)
    files = [tmp_path / f"pid{rank}" for rank in range(2)]
    try:
        wait_until(lambda: process.poll() is not None or all(f.exists() and f.read_text().endswith(".") for f in files), 90)
        pids = [int(file.read_text().rstrip(".")) for file in files]
        process.send_signal(number)
        end = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < end:
            time.sleep(0.01)
            if number in (signal.SIGINT, signal.SIGHUP):  # until it is gone: also while the interpreter tidies up
                process.send_signal(number)
        assert process.poll() == status
        assert told in said.read_text()
        wait_until(lambda: not any(alive(pid) for pid in pids), 60)
    finally:
        process.kill()
        process.wait()


HUNG_UP = """
    import os, pty, signal, sys
    from pathlib import Path
    from tulu_mega.launch import ranks, run_dir
    launcher = ranks.start_world(1, sys.argv[1], [sys.executable, "-c", sys.argv[2]], {}, 1, 120.0)
    sys.exit(launcher)
"""
SAVES = """
import os, signal, sys, time
from tulu_mega.launch.reporting import ASKS, ERROR_FILE, HANGUP_LOG
from tulu_mega.launch import reporting
from tulu_mega.errors import Stopped
asked, terminal = [], reporting.Terminal()
def note(number, _):
    asked.append(number)
    terminal.closed()
for number in ASKS:
    signal.signal(number, note)
print("at work", flush=True)
open(os.environ["READY"], "w").close()
while not asked:
    time.sleep(0.05)
time.sleep(0.5)
reporting.report_stop(Stopped(3))
sys.exit(143)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a terminal's signals")
@pytest.mark.parametrize("reader", ["", " 2>&1 | cat"], ids=["shown", "piped"])
def test_a_terminal_that_is_closed_asks_the_run_to_end(tmp_path, reader):
    """It sends SIGHUP, to ranks and launcher, and what is written to it from then on is an error; so is what is written to a
    reader that the same signal has ended."""
    (tmp_path / "launch.py").write_text(textwrap.dedent(HUNG_UP))
    process, terminal = pty.fork()
    if process == 0:
        as_from_a_terminal()
        os.environ["READY"] = str(tmp_path / "ready")
        words = shlex.join([sys.executable, str(tmp_path / "launch.py"), str(tmp_path / "run"), SAVES])
        os.execv("/bin/bash", ["bash", "-c", f"{words}{reader}" if reader else f"exec {words}"])
    ended, status = 0, 0
    try:
        wait_until((tmp_path / "ready").exists, 120)
        os.close(terminal)
        end = time.monotonic() + 120
        while not ended and time.monotonic() < end:
            ended, status = os.waitpid(process, os.WNOHANG)
            time.sleep(0.05)
    finally:
        if not ended:
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
    assert reader or os.waitstatus_to_exitcode(status) == 143
    log = tmp_path / "run/logs/hangup.log"
    wait_until(lambda: log.exists() and "stopped after" in log.read_text(), 120)
    told = log.read_text()
    assert "the terminal was closed: the run is asked to end" in told and "stopped after step 3, which is saved" in told


def test_whoever_was_told_to_ignore_a_closed_terminal_does(monkeypatch):
    """As by nohup."""
    numbers = (signal.SIGHUP, signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGUSR1)
    before = {number: signal.getsignal(number) for number in numbers}  # a launcher that was asked ignores them at its end
    try:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        with ranks._signals_noted(os.devnull) as asked:
            os.kill(os.getpid(), signal.SIGHUP)
            os.kill(os.getpid(), signal.SIGUSR1)
            wait_until(lambda: asked, 60)
        assert asked == [signal.SIGUSR1]
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_what_an_interrupted_run_loses(tmp_path):
    assert run_dir.lost(None) == "nothing is kept"
    assert run_dir.lost(str(tmp_path)).startswith("nothing was saved, the same command begins anew")
    for step in (4, 8):
        (tmp_path / f"checkpoints/step_{step}").mkdir(parents=True)
    (tmp_path / "metrics.jsonl").write_text("".join(f'{{"step": {step}}}\n' for step in range(1, 12)))
    assert run_dir.lost(str(tmp_path)) == (
        "the same command goes on from step 8, 3 after it are lost; SIGTERM would have saved first"
    )


def test_a_name_that_is_too_long_is_told(tmp_path, capsys):
    assert cli.main(["sft", "--model", "m", "--data.train", "d.jsonl", "--run_dir", str(tmp_path / ("r" * 300))]) == 2
    (line,) = [each for each in capsys.readouterr().err.splitlines() if "r" * 300 in each]
    assert line.startswith("error: ") and "too long for the name of a file" in line


def test_a_rank_whose_neighbour_is_gone_says_so_in_a_line(monkeypatch):
    """Where it waited, and no traceback: that of the one that failed is the one to read."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")

    def caught(message: str) -> str:
        try:
            try:
                raise RuntimeError(message)
            except RuntimeError as first:
                raise ValueError("the checkpoint could not be written") from first
        except ValueError as error:
            return reporting.lost_another(error)

    gloo = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:544] Connection closed by peer [10.0.0.2]:41211"
    assert caught(gloo) == f"rank 1 lost another rank; that one's end says why ({gloo})"
    assert "lost another rank" in caught("NCCL error: remote process exited or there was a network error, NCCL version 2.29.7")
    assert caught("CUDA out of memory") == ""
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert caught(gloo) == ""


def as_from_a_terminal() -> None:
    """Signals that these tests' own parent ignores, as under nohup, are not ignored."""
    for number in (signal.SIGHUP, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL if number == signal.SIGHUP else signal.default_int_handler)


def wait_until(condition, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.1)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


ENV = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}


def test_a_joined_world():
    world = launcher.joined_world(ParallelSettings(tensor=2, pipeline=2), ENV)
    assert world == launcher.World(rank=5, size=8, local_rank=1, local_size=4, data_parallel=2)


@pytest.mark.parametrize(
    ("parallel", "env", "message"),
    [
        (ParallelSettings(tensor=3), ENV, "do not divide the world of 8"),
        (ParallelSettings(tensor=2, data=2), ENV, "= 4 processes, but torchrun started 8"),
        (ParallelSettings(), {k: v for k, v in ENV.items() if k != "LOCAL_RANK"}, "but not LOCAL_RANK"),
        (ParallelSettings(), {**ENV, "RANK": "x"}, "RANK='x'"),
    ],
)
def test_a_world_that_does_not_fit(parallel, env, message):
    with pytest.raises(UserError, match=message):
        launcher.joined_world(parallel, env)


def test_more_processes_than_gpus(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match=r"takes 2 processes .* has 1 GPU"):
        launcher._check_devices(ParallelSettings(tensor=2), 2)


def test_under_a_foreign_torchrun_rank_0_prints_and_all_record(tmp_path, monkeypatch, capsys):
    for rank, printed in (("0", "error: wrong\n"), ("1", "")):
        file = tmp_path / f"{rank}.json"
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))
        reporting.report(["wrong"])
        assert capsys.readouterr().err == printed
        assert '"message": "wrong"' in file.read_text()


@pytest.mark.parametrize(
    ("given", "cuda", "seen"),
    [
        ({}, True, {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}),
        ({}, False, {}),
        ({"PYTORCH_ALLOC_CONF": "max_split_size_mb:64"}, True, {"PYTORCH_ALLOC_CONF": "max_split_size_mb:64"}),
        ({"PYTORCH_CUDA_ALLOC_CONF": ""}, True, {"PYTORCH_CUDA_ALLOC_CONF": ""}),
    ],
)
def test_a_rank_s_allocator_grows_its_segments_unless_told_otherwise(monkeypatch, given, cuda, seen):
    """Packs of another length each step would leave gaps between segments of a fixed size."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: cuda)
    with mock.patch.dict(os.environ, given | {"GLOO_SOCKET_IFNAME": "lo"}):
        for name in {*launcher.ALLOCATOR} - given.keys():
            os.environ.pop(name, None)
        launcher._usual_environment()
        assert {name: os.environ[name] for name in launcher.ALLOCATOR if name in os.environ} == seen


def test_the_environment_is_left_alone():
    assert "TULU_MEGA_LAUNCHER_PID" not in os.environ
