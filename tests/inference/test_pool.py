"""The owner of servers, with a small program in vLLM's place: same routes, an engine process of its own, shared memory."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tulu_mega.config import RolloutSettings
from tulu_mega.errors import UserError
from tulu_mega.inference import pool as server_pool
from tulu_mega.inference.addresses import ask_restart, attached, read_record
from tulu_mega.inference.command_line import ServerOptions
from tulu_mega.inference.pool import ServerPool
from tulu_mega.vllm_plugin.auth import ASKED, KEY, RESTART

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="sessions and /dev/shm")

STUB = """
    import json, os, subprocess, sys, time
    from http.server import BaseHTTPRequestHandler, HTTPServer

    ENGINE = '''
    import signal, time
    from multiprocessing.shared_memory import SharedMemory
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # one that does not end when it is asked to
    segment = SharedMemory("SEGMENT" + PORT, create=True, size=4096)
    print("engine up", flush=True)
    time.sleep(600)
    '''

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            known = self.headers["Authorization"] == "Bearer " + os.environ["TULU_MEGA_ROLLOUT_KEY"]
            self.send_response(200 if known else 401)
            self.end_headers()
            about = {"incarnation": int(os.environ["TULU_MEGA_SERVER_INCARNATION"]), "longest": 8, "vocabulary": 8}
            self.wfile.write(json.dumps(about).encode())

        def do_POST(self):
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            assert self.path == "RESTART" and asked["incarnation"] == int(os.environ["TULU_MEGA_SERVER_INCARNATION"])
            print("asked:", asked["why"], flush=True)
            os._exit(ASKED)

        def log_message(self, *_):
            pass

    BEFORE
    listener = HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler)
    port = str(listener.server_port)
    engine = ENGINE.replace("PORT", repr(port)).replace("\\n    ", "\\n")
    subprocess.Popen([sys.executable, "-c", engine], stdout=subprocess.PIPE).stdout.readline()
    listener.serve_forever()
"""


SEGMENT = f"tulu_mega_stub_{os.getpid()}_"
"""How names of shared memory of these tests' small programs begin; other sessions of the tests have their own."""


@pytest.fixture
def stub(tmp_path, monkeypatch) -> Callable[[str], None]:
    """Puts the small program in vLLM's place, with some lines of the test's own before it listens."""

    def put(before: str = "") -> None:
        script = tmp_path / "stub.py"
        text = textwrap.dedent(STUB).replace("BEFORE", before).replace("RESTART", RESTART).replace("ASKED", str(ASKED))
        text = text.replace("SEGMENT", SEGMENT)
        script.write_text(text)
        monkeypatch.setattr(server_pool, "command", lambda _options, port, on_cpu: [sys.executable, str(script), str(port)])

    put()
    return put


def pool(tmp_path: Path, servers: int = 1, **values) -> ServerPool:
    return ServerPool(ServerOptions("no model"), tmp_path, servers, **{"start_timeout": 120.0, "restarts": 2, **values})


def session_of(tmp_path: Path, number: int = 0) -> list[psutil.Process]:
    """Keeper, server, its engine and that one's resource tracker, in the order in which they began."""
    leader, found = read_record(tmp_path / "servers", number).pid, []
    for process in psutil.process_iter():
        try:
            if leader and os.getsid(process.pid) == leader and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (OSError, psutil.Error):
            pass
    return sorted(found, key=lambda process: process.create_time())


def gone(processes: list[psutil.Process]) -> bool:
    return bool(processes) and not psutil.wait_procs(processes, timeout=60)[1]


def until(condition: Callable[[], bool]) -> bool:
    end = time.monotonic() + 120
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


def segments() -> list[str]:
    return [name for name in os.listdir("/dev/shm") if name.startswith(SEGMENT)]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


def settings(servers: int = 1, **values) -> RolloutSettings:
    return RolloutSettings(servers=servers, **{"start_timeout": 120.0, **values})


def test_leaving_the_pool_ends_everything(stub, tmp_path):
    with pool(tmp_path, 2) as started:
        addresses = started.wait()
        assert len({address.url for address in addresses}) == 2
        processes = session_of(tmp_path, 0) + session_of(tmp_path, 1)
        assert len(processes) == 8 and len(segments()) == 2
    assert gone(processes) and not segments()
    assert not (tmp_path / "servers").exists() and (tmp_path / "logs/server_1.log").exists()


@pytest.mark.parametrize("victim", [0, 1, 2], ids=["keeper", "server", "engine"])
def test_whatever_dies_the_rest_goes_too_and_a_new_one_comes(stub, tmp_path, monkeypatch, victim):
    with pool(tmp_path, 2) as started:
        monkeypatch.setenv(KEY, started.key)
        first = started.wait()
        processes = session_of(tmp_path)
        if victim == 2:  # vLLM notices that its engine is gone, and ends
            processes[1].kill()
        processes[victim].kill()
        now = attached(settings(2), tmp_path)
        assert now[1] == first[1] and now[0].incarnation > first[0].incarnation and now[0].key == first[0].key
        assert gone(processes) and len(session_of(tmp_path)) == 4
        if victim:  # a keeper that is killed cannot wait for the one that removes segments
            assert len(segments()) == 2
    assert victim == 0 or not segments()
    for name in segments():
        os.unlink(f"/dev/shm/{name}")


def test_a_server_whose_directory_was_removed_goes_on_and_is_started_again(stub, tmp_path):
    stub()
    directory = tmp_path / "run"
    with pool(directory, 1) as started:
        (before,) = started.wait()
        session = session_of(directory, 0)
        shutil.rmtree(directory)
        session[1].kill()
        assert until(lambda: (told := read_record(directory / "servers", 0)) is not None and told.state == "ready")
        (now,) = started.wait()
        assert now.incarnation > before.incarnation


def test_who_cannot_look_after_servers_says_so(stub, tmp_path, monkeypatch):
    stub()
    monkeypatch.setattr(server_pool, "write_record", fail_from_now(server_pool.write_record, after=2))
    with pool(tmp_path, 1) as started, pytest.raises(UserError, match="No space left on device"):
        started.wait()
        started.watch_until(threading.Event())


def fail_from_now(write: Callable[..., None], after: int) -> Callable[..., None]:
    """A function that finds the disk full once it was called so often."""
    calls = itertools.count(1)

    def call(*arguments: object) -> None:
        if next(calls) > after:
            raise OSError(28, "No space left on device")
        write(*arguments)

    return call


def test_a_log_is_kept_within_bounds(stub, tmp_path, monkeypatch):
    monkeypatch.setattr(server_pool, "LOG_BYTES", 50_000)
    talk = "[print('x' * 99, flush=True) or time.sleep(1e-4) for _ in range(5000)]; print('said all', flush=True)"
    stub(f"exec({talk!r})")
    with pool(tmp_path, 1) as started:
        started.wait()
        log, before = tmp_path / "logs/server_0.log", tmp_path / "logs/server_0.log.1"
        assert until(before.exists)
        # ten times that was said; its last line may have been the last before the log was put aside
        assert until(lambda: b"said all" in log.read_bytes() + before.read_bytes() and log.stat().st_size <= 50_000)
        assert before.read_text().count("x" * 99) > 100


def test_only_the_owner_may_enter_the_directory(stub, tmp_path):
    stub()
    with pool(tmp_path / "run", 1):
        assert stat.S_IMODE((tmp_path / "run").stat().st_mode) == 0o700


def test_a_rank_may_ask_for_another_one(stub, tmp_path, monkeypatch):
    with pool(tmp_path) as started:
        monkeypatch.setenv(KEY, started.key)
        (first,) = attached(settings(), tmp_path)
        processes = session_of(tmp_path)
        for process in processes[1:]:
            process.suspend()  # it cannot end by itself
        ask_restart(tmp_path, first, "its update broke")
        (second,) = attached(settings(), tmp_path)
        assert second.incarnation > first.incarnation and gone(processes) and len(segments()) == 1
        assert attached(settings(), tmp_path) == [second], "asked once, done once"


def test_a_trainer_elsewhere_may_ask_for_another_one(stub, tmp_path, monkeypatch, capfd):
    """It knows the server's URL and key alone, and has a run directory of its own."""
    with pool(tmp_path / "serve", ports=[free_port()]) as started:
        monkeypatch.setenv(KEY, started.key)
        urls = [started.wait()[0].url]
        (first,) = attached(settings(urls=urls), tmp_path / "run")
        processes = session_of(tmp_path / "serve")
        ask_restart(tmp_path / "run", first, "its update broke", remote=True)
        assert not (tmp_path / "run").exists(), (
            "the process remembers it: clocks of other machines and files of other runs play no part"
        )
        (second,) = attached(settings(urls=urls), tmp_path / "run")
        assert second.url == first.url and second.incarnation > first.incarnation and gone(processes)
        assert "asked: its update broke" in (tmp_path / "serve/logs/server_0.log").read_text()
    assert "server 0 ended as a trainer asked it to; it is started again (1 of 2 times)" in capfd.readouterr().err


def test_one_that_does_not_answer_is_replaced(stub, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(server_pool, "HEALTH_SECONDS", 2.0)
    monkeypatch.setattr(server_pool, "HEALTH_PERIOD_SECONDS", 0.2)
    with pool(tmp_path) as started:
        (first,) = started.wait()
        processes = session_of(tmp_path)
        processes[1].suspend()
        assert until(lambda: read_record(tmp_path / "servers", 0).incarnation > first.incarnation)
        monkeypatch.setattr(server_pool, "HEALTH_PERIOD_SECONDS", 60.0)
        (second,) = started.wait()
        assert second.incarnation > first.incarnation and gone(processes)
    assert "did not answer /health 3 times in a row; it is started again (1 of 2 times)" in capfd.readouterr().err


def test_one_that_is_killed_while_it_starts_is_started_again(stub, tmp_path):
    once = tmp_path / "once"
    stub(f"if not os.path.exists({str(once)!r}): open({str(once)!r}, 'w').close(); os.kill(os.getpid(), 9)")
    with pool(tmp_path) as started:
        assert len(started.wait()) == 1 and once.exists()


def test_after_its_restarts_the_end_of_its_log_is_the_error(stub, tmp_path, monkeypatch):
    stub("print('out of memory, perhaps', flush=True); os.kill(os.getpid(), 9)")
    with pool(tmp_path) as started:
        monkeypatch.setenv(KEY, started.key)
        with pytest.raises(UserError, match=r"ended with status 137 while it started after 2 restart\(s\)") as failed:
            attached(settings(), tmp_path)
    assert str(failed.value).count("out of memory, perhaps") == 3 and str(tmp_path / "logs/server_0.log") in str(failed.value)


def test_one_that_cannot_start_is_not_tried_again(stub, tmp_path):
    stub("sys.exit('no such model')")
    with pool(tmp_path) as started, pytest.raises(UserError, match="status 1 while it started; the end of its log") as failed:
        started.wait()
    assert str(failed.value).count("no such model") == 1


def test_servers_that_share_a_gpu_start_one_after_the_other(stub, tmp_path):
    """vLLM measures what is free while it starts."""
    told = tmp_path / "told"
    before = [
        f"told = open({str(told)!r}, 'a')", "print('start', file=told, flush=True)",
        f"while open({str(told)!r}).read().count('start') < 2: time.sleep(0.01)",
        "time.sleep(1)", "print('ready', file=told, flush=True)",
    ]  # fmt: skip
    stub("\n".join(before))
    with pool(tmp_path, 3, devices=[[0, 1], [1, 2], [3]]) as started:
        assert len(started.wait()) == 3
    lines = told.read_text().split()
    assert lines[:3] == ["start", "start", "ready"] and len(lines) == 6, "two at once, the third when its neighbour is ready"


def test_one_that_met_others_on_its_gpu_is_tried_again(stub, tmp_path):
    once = tmp_path / "once"
    stub(f"if not os.path.exists({str(once)!r}): open({str(once)!r}, 'w').close(); sys.exit('Error in memory profiling.')")
    with pool(tmp_path, devices=[[0]], shared=True) as started:
        assert len(started.wait()) == 1 and once.exists()


def test_one_that_takes_too_long_to_start_is_ended(stub, tmp_path):
    stub("time.sleep(600)")
    with pool(tmp_path, start_timeout=1.0) as started:
        assert until(lambda: session_of(tmp_path))
        processes = session_of(tmp_path)
        with pytest.raises(UserError, match="was not ready after 1 s"):
            started.wait()
        assert gone(processes)


def test_somebody_else_on_its_port_is_never_spoken_to(stub, tmp_path):
    """The server that is spoken to is the one that was started, whoever listens."""
    stub("import socket; other = socket.create_server(('127.0.0.1', 0)); sys.argv[1] = str(other.getsockname()[1])")
    with pool(tmp_path) as started, pytest.raises(UserError, match="Address already in use"):
        started.wait()


LAUNCHER = """
    import signal, sys, time
    from pathlib import Path
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    from tulu_mega.inference import pool as server
    from tulu_mega.inference.command_line import ServerOptions
    server.command = lambda _options, port, on_cpu: [sys.executable, sys.argv[1], str(port)]
    if __name__ == "__main__":
        with server.ServerPool(ServerOptions("no model"), Path(sys.argv[2])) as pool:
            pool.wait()
            Path(sys.argv[2], "told").touch()
            time.sleep(600)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_no_process_and_no_segment_outlives_the_launcher(stub, tmp_path, number):
    script = tmp_path / "launch.py"
    script.write_text(textwrap.dedent(LAUNCHER))
    launcher = subprocess.Popen([sys.executable, str(script), str(tmp_path / "stub.py"), str(tmp_path)])
    try:
        assert until((tmp_path / "told").exists)
        # until its exec is done a tracker looks like the engine that it came from, and would be killed as that
        assert until(lambda: any("resource_tracker" in " ".join(each.cmdline()) for each in session_of(tmp_path)))
        processes = session_of(tmp_path)
        assert len(processes) == 4 and segments()
    finally:
        launcher.send_signal(number)
        launcher.wait()
    assert gone(processes) and not segments()
