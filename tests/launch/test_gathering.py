"""Machines of a run meet by addresses, not by their names, and say who is waited for; what keeps them apart is told in a line."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from unittest import mock

import pytest
from torch.distributed import TCPStore

from tests.launch.test_launcher import wait_until
from tests.lib.clocks import SteppingClock
from tests.lib.world import free_port
from tulu_mega.errors import UserError
from tulu_mega.launch import agent, gathering, route, stores
from tulu_mega.launch.gathering import Place, gathered
from tulu_mega.launch.meeting import met

SECONDS = 60
"""In which what is wrong is told, on a busy machine too; a machine that is missing is waited for much longer."""


def test_this_machine_s_address_is_that_on_the_way_to_the_first(monkeypatch):
    """A name of one's own may be unknown to the others, or stand for the loopback."""
    assert route.own_address("127.0.0.1", 9) == route.own_address("localhost", 9) == "127.0.0.1"
    assert route.own_address("127.0.0.1", 9, "localhost") == "127.0.0.1"
    assert route.interface("127.0.0.1") == "lo" and route.interface("192.0.2.77") is None
    names = {"debian": ["127.0.1.1"], "far": ["10.0.0.9"], "here": ["127.0.1.1"]}
    monkeypatch.setattr(route, "resolved", lambda host, port, setting: names[host])
    ways = {"127.0.1.1": "127.0.0.1", "10.0.0.9": "10.0.0.5", "192.0.2.1": "10.0.0.5"}
    monkeypatch.setattr(route, "_way", lambda address, port: ways.get(address))
    assert route.own_address("far", 9) == "10.0.0.5"
    assert route.own_address("debian", 9) == "10.0.0.5"
    with pytest.raises(UserError, match=r"LOCAL_ADDR = here: leads to 127\.0\.1\.1, which only this machine reaches"):
        route.own_address("far", 9, "here")
    ways.clear()
    with pytest.raises(UserError, match=r"MASTER_ADDR = far \(10\.0\.0\.9\): no network route leads there"):
        route.own_address("far", 9)


def test_names_that_nobody_knows_are_told_at_once(monkeypatch):
    monkeypatch.setattr(route, "RESOLVE_SECONDS", 0.1)
    for master, own, told in (("none.invalid", None, "MASTER_ADDR"), ("127.0.0.1", "none.invalid", "LOCAL_ADDR")):
        with pytest.raises(UserError, match=rf"{told} = none\.invalid: no such machine is known here"):
            route.own_address(master, 9, own)


def place(port: int, host: bool, **changed) -> Place:
    return Place(**{"master": "127.0.0.1", "port": port, "run_id": "r", "nodes": 2, "host": host, **changed})


def together(*places: Place) -> list[str]:
    """What becomes of agents that gather; in time."""
    told = [""] * len(places)
    stores = []

    def gather(number: int) -> None:
        try:
            stores.append(gathered(places[number]))
        except UserError as error:
            told[number] = str(error)

    began = time.monotonic()
    threads = [threading.Thread(target=gather, args=(number,)) for number in range(len(places))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert time.monotonic() - began < SECONDS
    return told


def test_machines_gather_and_others_of_another_run_are_told():
    port = free_port()
    assert together(place(port, False), place(port, True)) == ["", ""]
    port = free_port()
    host, other = together(place(port, True), place(port, False, run_id="another", nodes=3))
    assert "RUN_ID is 'another' here, 'r' there; NNODES is 3 here, 2 there; give all machines of a run the same" in other
    assert f"{socket.gethostname()}: RUN_ID is 'another' here" in host


def test_machines_gather_by_addresses_of_ipv6():
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError as error:
        pytest.skip(f"no IPv6 here: {error}")
    port = free_port()
    assert together(place(port, False, master="::1"), place(port, True, master="::1")) == ["", ""]
    assert route.own_address("::1", port) == "::1" and route.interface("::1") == "lo"


def test_whoever_is_missing_is_named(monkeypatch, capsys):
    monkeypatch.setattr(gathering, "PATIENCE", 0.6)
    monkeypatch.setattr(gathering, "WORD_SECONDS", 0.2)
    monkeypatch.setattr(gathering, "time", SteppingClock(0.1))
    (told,) = together(place(port := free_port(), True))
    assert f"127.0.0.1, port {port}: 1 of 2 machines have come: {socket.gethostname()} ({os.getpid()}); start the others" in told
    assert "1 of 2 machines have come" in capsys.readouterr().err
    (told,) = together(place(port := free_port(), False))
    assert f"127.0.0.1, port {port}: the first machine does not answer there (Connection refused); start NODE_RANK 0" in told
    assert "does not answer there (Connection refused) yet" in capsys.readouterr().err


def test_a_port_that_is_taken_and_an_address_of_another_machine(monkeypatch):
    with socket.create_server(("", 0)) as other:
        (told,) = together(place(port := other.getsockname()[1], True))
    assert told.startswith(f"MASTER_PORT = {port}: cannot listen there (Address already in use)")
    monkeypatch.setattr(gathering, "resolved", lambda *_: ["127.0.0.2"])
    monkeypatch.setattr(gathering.socket, "create_connection", _refused)
    (told,) = together(place(free_port(), True))
    assert "MASTER_ADDR = 127.0.0.1 (127.0.0.2) does not lead to this machine, which has NODE_RANK 0 (Connection refused)" in told


def test_what_listens_there_and_is_no_store_of_ours_is_told(monkeypatch, capsys):
    """Another program, and the store of a torchrun that another started; by machines that gather, and by a rank that somebody
    started by hand."""
    monkeypatch.setattr(stores, "HANDSHAKE_SECONDS", 0.5)
    monkeypatch.setattr(stores, "STRANGER_SECONDS", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as other:  # it takes connections and says nothing
        (told,) = together(place(port := other.getsockname()[1], False))
        environ = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_PORT": str(port)}
        with pytest.raises(UserError, match="does not answer as torchrun's store"), met(environ | {"MASTER_ADDR": "127.0.0.1"}):
            pass
        first = environ | {"RANK": "0", "MASTER_ADDR": "127.0.0.1"}
        with pytest.raises(UserError, match=f"MASTER_PORT = {port}: cannot listen there"), met(first):
            pass
    assert f"port {port}: what listens there does not answer as torchrun's store" in told
    assert "choose another MASTER_PORT, the same on all machines" in told
    monkeypatch.setattr(stores, "HANDSHAKE_SECONDS", 2.0)
    monkeypatch.setattr(stores, "STRANGER_SECONDS", 60.0)
    theirs = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    (told,) = together(place(theirs.port, False))
    assert "the store that listens there belongs to another torchrun, not to this program" in told


def test_one_machine_more_is_told(capsys):
    port, kept = free_port(), []
    threads = [threading.Thread(target=lambda host=host: kept.append(gathered(place(port, host)))) for host in (True, False)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    kept.append(gathered(place(port, False)))
    assert "all 2 machines had come already; this one replaces one that left" in capsys.readouterr().err


def agents(*words: str, local: str = "1") -> tuple[int, str]:
    """Exit status and word of an agent that is given these, and would run a module that is not there."""
    with mock.patch.dict(os.environ), pytest.MonkeyPatch.context() as patch:  # an agent names itself to its ranks there
        said = []
        patch.setattr(agent, "print", lambda text, **_: said.append(text), raising=False)
        patch.setattr(agent, "_moments", dict)
        rest = [f"--nproc-per-node={local}", "--rdzv-backend", "c10d", "--rdzv-conf", "is_host=true", "-m", "no_such_module"]
        return agent.main([*words, *rest]), "\n".join(said)


def test_two_runs_on_one_machine_and_no_numbers_are_told_by_the_agent():
    with socket.create_server(("", 0)) as other:
        port = other.getsockname()[1]
        status, told = agents("--nnodes", "1", "--rdzv-endpoint", f"127.0.0.1:{port}")
    assert status == 2 and told.startswith(f"error: MASTER_PORT = {port}: cannot listen there (Address already in use)")
    for nodes in ("two", "0", "1:x"):
        status, told = agents("--nnodes", nodes, "--rdzv-endpoint", f"127.0.0.1:{port}")
        assert (status, told) == (2, f"error: NNODES = {nodes}: expected the number of machines")
    ends = {"127.0.0.1:70000": "MASTER_PORT = 70000", "h:http": "MASTER_PORT = http", ":29500": "MASTER_ADDR is empty"}
    for end, wanted in ends.items():
        status, told = agents("--nnodes", "1", "--rdzv-endpoint", end)
        assert status == 2 and told.startswith(f"error: {wanted}")
    for local in ("0", "-1", "1.5"):
        status, told = agents("--nnodes", "1", "--rdzv-endpoint", f"127.0.0.1:{port}", local=local)
        assert status == 2 and told.startswith(f"error: GPUS_PER_NODE = {local}: ")


def _refused(*_, **__):
    raise ConnectionRefusedError(111, "Connection refused")


RANK = """
    import os, time
    from tulu_mega.launch import launcher
    launcher.die_with_launcher()
    open(os.environ["PID"], "w").write(str(os.getpid()))
    time.sleep(600)
"""


def test_ranks_end_with_an_agent_that_is_killed(tmp_path):
    words = ["--nnodes", "1", "--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{free_port()}"]
    (tmp_path / "rank.py").write_text(textwrap.dedent(RANK))
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2]), "PID": str(tmp_path / "pid")}
    node = subprocess.Popen([sys.executable, "-m", "tulu_mega.agent", *words, str(tmp_path / "rank.py")], env=env)
    try:
        wait_until(lambda: node.poll() is not None or ((tmp_path / "pid").exists() and (tmp_path / "pid").read_text()), 120)
        rank = int((tmp_path / "pid").read_text())
        node.send_signal(signal.SIGKILL)
        node.wait()
        wait_until(lambda: not _runs(rank), 60)
    finally:
        node.kill()
    assert not _runs(rank)


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
