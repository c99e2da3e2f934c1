"""Nodes that do not go together end before anything is computed, on all of them, and say which has what. Two processes stand for
nodes; `launcher.run` is what a rank of theirs goes through."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.launch.test_launcher import wait_until
from tests.lib import world
from tests.lib.clocks import SteppingClock
from tulu_mega.config import SftSettings
from tulu_mega.errors import UserError
from tulu_mega.launch import launcher, meeting, sameness
from tulu_mega.launch.launcher import World
from tulu_mega.outside.versions import of_package

SECONDS = 60
"""In which what is wrong with a node is told, on a busy machine too; one that is missing is waited for much longer."""


def recipe(settings: SftSettings, world: World) -> int:
    """Ends when both are at work: the store goes with the first rank, and the second may not have heard it yet."""
    here = Path(settings.run_dir).parent
    (here / f"at_work_{world.rank}").touch()
    wait_until(lambda: len(list(here.glob("at_work_*"))) == world.size, SECONDS)
    return 10 + world.rank


def settings_of(directory: Path, changed: dict) -> SftSettings:
    return SftSettings.model_validate({"model": "m", "run_dir": str(directory / "run"), "data": {"train": "x"}, **changed})


def as_node(work) -> Callable[..., list[tuple[list[str] | int, float]]]:
    """Has each case take place as if a rank were a node, over a store of its own that the first rank holds; what becomes of the
    rank in each, and after how many seconds."""

    @functools.wraps(work)
    def each(ports: list[int], directory: Path, cases: list[str]) -> list[tuple[list[str] | int, float]]:
        os.environ |= {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
        del os.environ["TORCHELASTIC_USE_AGENT_STORE"]
        found = []
        for port, case in zip(ports, cases, strict=True):
            os.environ["MASTER_PORT"] = str(port)
            home = directory / case
            home.mkdir(exist_ok=True)
            began = time.monotonic()
            try:
                got = work(home, case, os.environ["RANK"])
            except UserError as error:
                got = error.problems
            found.append((got, time.monotonic() - began))
        return found

    return each


def on_two_nodes(work, directory: Path, cases: list[str]) -> dict[str, tuple[list[str] | int, list[str] | int]]:
    """By case, what becomes of each node; all of it in time."""
    first, second = world.run(2, work, [world.free_port() for _ in cases], directory, cases)
    assert all(seconds < SECONDS for _, seconds in (*first, *second))
    return {case: (one, other) for case, (one, _), (other, _) in zip(cases, first, second, strict=True)}


@as_node
def started(home: Path, case: str, rank: str) -> int:
    """A rank up to where it goes to work. The second node is the odd one, but for what the first finds out."""
    odd = rank == "1"

    def prepare(_: SftSettings) -> None:
        assert rank == "0"
        if case == "data":
            time.sleep(1)
            raise UserError("the data is not there")

    changed = {"settings": {"optim": {"lr": 2e-5}, "checkpoint": {"every": 7}}, "layout": {"parallel": {"tensor": 3}}}
    settings = settings_of(home, changed.get(case, {}) if odd else {})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(meeting, "SEEN_SECONDS", 0.5)
        if case == "program" and odd:
            (home / "older").mkdir()
            (home / "older/cli.py").write_text("")
            patch.setattr(sameness, "CODE", home / "older")
            patch.setattr(sameness, "__version__", "0.0.1")
            patch.setenv("NVTE_FLASH_ATTN", "0")
            patch.setenv("NCCL_P2P_DISABLE", "1")
            patch.setattr(sameness, "of_package", lambda name: "3.6.1" if name == "triton" else of_package(name))
        if case == "disk":  # the same path leads elsewhere
            (home / rank).mkdir()
            patch.chdir(home / rank)
            settings = settings.model_copy(update={"run_dir": "run"})
        return launcher.run(f"{__name__}:recipe", settings, [], prepare, run_dir=settings.run_dir)


@pytest.mark.ranks
def test_what_differs_ends_the_start_on_every_node(tmp_path):
    cases = ["settings", "layout", "program", "disk", "data", "same"]
    found = on_two_nodes(started, tmp_path, cases)
    assert found.pop("same") == (10, 11)  # they go to work
    assert all(first == second for first, second in found.values())
    told = {case: "\n".join(first) for case, (first, _) in found.items()}
    assert "(rank 1): setting optim.lr is 2e-05, elsewhere 5e-06; make them the same" in told["settings"]
    assert "(rank 1): setting checkpoint.every is 7, elsewhere null; make them the same" in told["settings"]
    assert told["layout"].startswith("node ") and "(rank 1): parallel: " in told["layout"]
    assert "(rank 1): tulu_mega's code is " in told["program"]
    assert "(rank 1): tulu_mega is 0.0.1, elsewhere " in told["program"]
    assert "(rank 1): variable NVTE_FLASH_ATTN is 0, elsewhere missing; make them the same" in told["program"]
    for more in ("variable NCCL_P2P_DISABLE is 1", "package triton is 3.6.1"):
        assert f"(rank 1): {more}, elsewhere " in told["program"]
    assert (
        "(rank 1): a file that node " in told["disk"]
        and "run_dir has to be on a file system that all nodes share" in told["disk"]
    )
    assert told["data"] == "the data is not there"
    assert [len(told[case].splitlines()) for case in cases[:-1]] == [2, 1, 5, 1, 1]
    assert not list(tmp_path.rglob("run/*"))  # nothing is left behind


@as_node
def refused(_home: Path, case: str, rank: str) -> list[str]:
    """A rank that cannot read its settings, or one that can."""
    with meeting.refusing_together(os.environ):
        if rank in case:
            raise UserError("unknown setting optim.rl")
    with meeting.met(os.environ) as nodes:
        nodes.agree(dict, None)
    return []


@pytest.mark.ranks
def test_a_node_that_cannot_read_its_settings_ends_the_others(tmp_path):
    for case, (first, second) in on_two_nodes(refused, tmp_path, ["1", "0", "01"]).items():
        assert [each.rpartition(": ")[2] for each in (*first, *second)] == ["unknown setting optim.rl"] * 2
        assert case == "01" or first == second
        assert (f"(rank {case})" in first[0]) == (case != "01")


def test_whoever_is_not_there_is_named(monkeypatch, capsys):
    """The first rank waits with words, and not for ever."""
    monkeypatch.setattr(meeting, "PATIENCE", 0.5)
    monkeypatch.setattr(meeting, "WORD_SECONDS", 0.2)
    monkeypatch.setattr(meeting, "time", SteppingClock(0.05))
    monkeypatch.setattr(meeting, "FAREWELL_SECONDS", 0.1)
    environ = {"RANK": "0", "WORLD_SIZE": "3", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(world.free_port())}
    with meeting.met(environ) as nodes, pytest.raises(UserError, match=r"rank\(s\) 1, 2 did not come within"):
        nodes.agree(dict, None)
    assert "rank 0 waits for rank(s) 1, 2" in capsys.readouterr().err


def test_a_first_rank_that_does_not_answer_is_named(monkeypatch, capsys):
    monkeypatch.setattr(meeting, "PATIENCE", 0.5)
    monkeypatch.setattr(meeting, "WORD_SECONDS", 0.2)
    monkeypatch.setattr(meeting, "time", SteppingClock(0.05))
    environ = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(world.free_port())}
    with pytest.raises(meeting.Lost, match=r"does not answer at 127\.0\.0\.1"), meeting.met(environ):
        pass
    assert "rank 1 waits for rank 0, which does not answer" in capsys.readouterr().err
    environ["MASTER_ADDR"] = "no-such-machine.invalid"
    with (
        pytest.raises(UserError, match=r"calls itself .no-such-machine\.invalid., a name that is not known"),
        meeting.met(environ),
    ):
        pass


def test_on_one_machine_nobody_is_waited_for():
    environ = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "x", "MASTER_PORT": "1"}
    with meeting.met(environ) as nodes:
        nodes.agree(lambda: pytest.fail("nothing is to be compared"), None)
        nodes.lead(lambda: pytest.fail("the first rank leads"))
    with meeting.met({}) as nodes:
        assert nodes.refuse(["a problem"]) == ["a problem"]


def test_nodes_have_as_many_processes(monkeypatch):
    programs = {}
    for node, count in (("a", "8"), ("b", "4"), ("c", "8")):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", count)
        programs[node] = sameness.of_program()
    (told,) = sameness.differences(programs)
    assert told == "b: number of processes (GPUS_PER_NODE) is 4, elsewhere 8; make them the same"


def test_many_nodes_are_not_all_named():
    nodes = {f"n{rank}": {"tulu_mega": "1" if rank else "2"} for rank in range(9)}
    assert sameness.differences(nodes) == ["n0: tulu_mega is 2, elsewhere 1; make them the same"]
    nodes = {f"n{rank}": {"tulu_mega": "1" if rank > 8 else "2"} for rank in range(30)}
    assert sameness.differences(nodes) == ["n0, n1, n2, n3 and 5 more: tulu_mega is 2, elsewhere 1; make them the same"]
