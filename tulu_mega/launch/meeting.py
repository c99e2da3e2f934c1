"""The nodes of a run meet before its ranks do: what differs between them, or is wrong on one, ends the start on all of them.

Every rank of a world of several nodes comes here. They talk through the store in which the ranks meet later. Each rank publishes
what it has, the first rank compares, and all read its result.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tulu_mega.errors import UserError
from tulu_mega.launch import sameness, stores
from tulu_mega.launch.reporting import started_by_launcher
from tulu_mega.launch.run_dir import make_private

if TYPE_CHECKING:
    from torch.distributed import Store

PATIENCE = 600.0
"""Seconds that ranks may take to arrive: minutes where many read Python's modules from one file system."""
WORD_SECONDS = 10.0
"""Seconds between lines that say which ranks are missing."""
FAREWELL_SECONDS = 15.0
"""Seconds that the first rank, which holds the store, stays so that the others can read why they end."""
SEEN_SECONDS = 10.0
"""Seconds that a file may take to appear on another node."""
_NEEDED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class Lost(Exception):
    """Raised when the first rank is gone. The first rank's own log says why."""


@dataclass(frozen=True)
class Nodes:
    """One rank's part in the meeting. Where all ranks are on one machine, nothing is compared."""

    rank: int
    size: int
    first_here: bool
    """whether this is the first rank of its node, which reports for it"""
    store: Store | None
    """the store; None on one machine"""

    def agree(self, same: Callable[[], Mapping[str, str]], run_dir: str | None) -> None:
        """Compare the nodes, and check that they share the run's directory.

        Args:
            same: values that have to be the same on all nodes, by name.
            run_dir: None where the ranks share none.

        Raises:
            UserError: the same on every rank, with every difference.
            Lost: the first rank is gone.
        """
        if self.store is None:
            return
        mine = dict(same()) if self.first_here else None
        if found := self._heard("same", self._telling(mine), _differing):
            raise UserError(found)
        if run_dir is None:
            return
        with self._mark(run_dir) as mark:
            unseen = self.first_here and mark is not None and not _seen(Path(mark))
            if found := self._heard("mark", self._telling(run_dir if unseen else None), _unseen):
                raise UserError(found)

    def lead(self, work: Callable[[], Any]) -> None:
        """Run `work` on the first rank, however long it takes, while the others wait.

        Raises:
            UserError: the same on every rank, as the work does.
            Lost: the first rank is gone.
        """
        if self.store is None:
            if self.rank == 0:
                work()
            return
        problems: list[str] = []
        if self.rank == 0:
            try:
                work()
            except UserError as error:
                problems = error.problems
            self._say("led", problems)
        else:
            problems = self._hear("led", None)
        if problems:
            raise UserError(problems)

    def refuse(self, problems: list[str]) -> list[str]:
        """Publish this rank's problems and read the others'; return the problems with which all end."""
        if self.store is None:
            return problems
        return self._heard("same", {"host": socket.gethostname(), "problems": problems}, _differing)

    def _telling(self, value: Any) -> dict[str, Any]:
        return {"host": socket.gethostname(), "value": value}

    def _heard(self, name: str, mine: dict[str, Any], decide: Callable[[dict[int, dict[str, Any]]], list[str]]) -> list[str]:
        """Publish `mine` and return the first rank's decision about the values of all ranks."""
        self.store.set(f"{name}/{self.rank}", json.dumps(mine))
        if self.rank:
            return self._hear(name, PATIENCE + 60)
        told, missing = self._told(name)
        found = decide(told) if told else []
        if missing:
            found.append(f"rank(s) {_ranks(missing)} did not come within {PATIENCE:.0f} s; look at their logs")
        self._say(name, found)
        return found

    def _told(self, name: str) -> tuple[dict[int, dict[str, Any]], list[int]]:
        """Return, on the first rank, the values of the others and the ranks that sent none. It stops waiting once a rank reports
        a problem."""
        told: dict[int, dict[str, Any]] = {}
        left = list(range(self.size))
        clock = _Clock()
        while True:
            for rank in [each for each in left if self.store.check([f"{name}/{each}"])]:
                told[rank] = json.loads(self.store.get(f"{name}/{rank}"))
                left.remove(rank)
            if not left or any(each.get("problems") for each in told.values()):
                return told, []
            if clock.seconds > PATIENCE:
                return told, left
            clock.word(f"rank 0 waits for rank(s) {_ranks(left)}; look at their logs if that goes on")
            time.sleep(0.05)

    def _say(self, name: str, found: list[str]) -> None:
        """Publish the decision, on the first rank, and wait until the others have read it: the store may end with this
        process."""
        self.store.set(f"{name}/decided", json.dumps(found))
        end = time.monotonic() + FAREWELL_SECONDS
        while found and time.monotonic() < end:
            if self.store.check([f"{name}/heard/{each}" for each in range(1, self.size)]):
                break
            time.sleep(0.05)

    def _hear(self, name: str, seconds: float | None) -> list[str]:
        """Return the first rank's decision, on the other ranks.

        Args:
            seconds: time that the first rank may take; None for no limit.
        """
        from torch.distributed import DistError, DistStoreError

        clock = _Clock()
        while True:
            try:
                self.store.wait([f"{name}/decided"], timedelta(seconds=WORD_SECONDS))
                found = json.loads(self.store.get(f"{name}/decided"))
                self.store.set(f"{name}/heard/{self.rank}", "")
                return found
            except DistStoreError:  # it has not said it yet
                if seconds and clock.seconds > seconds:
                    raise Lost(f"rank 0 said nothing for {seconds:.0f} s; look at its log") from None
            except DistError:
                raise Lost("rank 0 ended before the ranks had met; look at its log") from None

    @contextlib.contextmanager
    def _mark(self, run_dir: str) -> Iterator[str | None]:
        """Yield a file that the first rank makes in the run's directory for the nodes to find; None where it cannot be made."""
        if self.rank:
            told = self._hear("marked", PATIENCE)
            yield told[0] if told else None
            return
        directory = Path(run_dir)
        made = not directory.exists()
        file = directory / f".nodes_{secrets.token_hex(8)}"
        try:
            make_private(directory)
            file.write_text("")
        except OSError:  # what the first rank does next says why
            self.store.set("marked/decided", json.dumps([]))
            yield None
            return
        self.store.set("marked/decided", json.dumps([str(file)]))
        try:
            yield str(file)
        finally:
            with contextlib.suppress(OSError):
                file.unlink()
                if made:
                    directory.rmdir()


@contextlib.contextmanager
def met(environ: Mapping[str, str]) -> Iterator[Nodes]:
    """Meets the other nodes, if there are any. The store stays as long as the context.

    Raises:
        UserError: there is no such host as the first rank's.
        Lost: the first rank does not answer.
    """
    try:
        rank, size, local, here = (int(environ[name]) for name in _NEEDED[:4])
        address, port = environ["MASTER_ADDR"], int(environ["MASTER_PORT"])
    except (KeyError, ValueError):
        rank = size = here = local = 0  # whoever asks for its place in the world says so
    # started again in a store that torchrun keeps, the ranks would hear the ones before them; `distributed` refuses that
    again = environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0" and _agents_store(environ)
    if here >= size or again or started_by_launcher():
        yield Nodes(rank, size, False, None)
        return
    from torch.distributed import PrefixStore

    holds = rank == 0 and not _agents_store(environ)
    if not holds:
        _await_listener(address, port, rank, local == 0)
    store = stores.opened(address, port, holds, PATIENCE, multi_tenant=not _agents_store(environ))
    yield Nodes(rank, size, local == 0, PrefixStore("tulu_mega/nodes", store))


@contextlib.contextmanager
def refusing_together(environ: Mapping[str, str]) -> Iterator[None]:
    """Wrap what a rank does before it meets the others: what is wrong here alone ends them too, and they say so.

    Raises:
        UserError: with what is wrong on any node.
    """
    try:
        yield
    except UserError as error:
        problems = error.problems
        with contextlib.suppress(Lost, UserError), met(environ) as nodes:
            problems = nodes.refuse(problems)
        raise UserError(problems) from None


class _Clock:
    """A clock that counts from when it was made, and prints a line now and then."""

    def __init__(self) -> None:
        self._began = self._said = time.monotonic()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._began

    def word(self, text: str) -> None:
        """Print a line if the last one was long ago."""
        if time.monotonic() - self._said >= WORD_SECONDS:
            self._said = time.monotonic()
            print(f"{self.seconds:.0f} s: {text}", file=sys.stderr, flush=True)


def _await_listener(address: str, port: int, rank: int, speaks: bool) -> None:
    """Wait until a program listens at the address.

    Args:
        speaks: whether this rank prints what it waits for.

    Raises:
        UserError: there is no such host.
        Lost: nobody has come to listen.
    """
    clock = _Clock()
    while True:
        try:
            socket.create_connection((address, port), timeout=5).close()
            return
        except socket.gaierror as error:
            if error.errno != socket.EAI_AGAIN or clock.seconds > PATIENCE:
                raise UserError(
                    f"{socket.gethostname()}: the machine of rank 0 calls itself {address!r}, a name that is not known here "
                    f"({error.strerror}); set LOCAL_ADDR there to its address, or have the name resolved"
                ) from None
            why = error.strerror
        except OSError as error:
            why = error.strerror or str(error)
            if clock.seconds > PATIENCE:
                raise Lost(f"rank {rank}: rank 0 does not answer at {address}, port {port} ({why}); look at its log") from None
        if speaks:
            clock.word(f"rank {rank} waits for rank 0, which does not answer at {address}, port {port} yet ({why})")
        time.sleep(0.2)


def _agents_store(environ: Mapping[str, str]) -> bool:
    """Whether torchrun's agent holds the store rather than the first rank."""
    return environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _differing(told: Mapping[int, Mapping[str, Any]]) -> list[str]:
    """Return the problems of ranks, with the nodes that have each where not all do; without problems, what differs."""
    nodes: dict[str, list[str]] = {}
    for rank, each in told.items():
        for problem in each.get("problems", ()):
            nodes.setdefault(problem, []).append(_name(rank, each))
    if nodes:
        return [
            problem if len(odd) == len(told) and len(odd) > 1 else f"{sameness.named(odd)}: {problem}"
            for problem, odd in nodes.items()
        ]
    return sameness.differences({_name(rank, each): each["value"] for rank, each in told.items() if each["value"] is not None})


def _unseen(told: Mapping[int, Mapping[str, Any]]) -> list[str]:
    odd = {_name(rank, each): each["value"] for rank, each in told.items() if each["value"] is not None}
    if not odd:
        return []
    return [
        f"{sameness.named(list(odd))}: a file that {_name(0, told[0])} wrote in run_dir = {next(iter(odd.values()))} is not seen "
        "there; run_dir has to be on a file system that all nodes share"
    ]


def _name(rank: int, told: Mapping[str, Any]) -> str:
    return f"node {told['host']} (rank {rank})"


def _seen(file: Path) -> bool:
    """Whether a file is there; a network file system may take some seconds to show it."""
    end = time.monotonic() + SEEN_SECONDS
    while not file.exists():
        if time.monotonic() > end:
            return False
        with contextlib.suppress(OSError):
            os.listdir(file.parent)  # lets an NFS client look again
        time.sleep(0.2)
    return True


def _ranks(ranks: Sequence[int]) -> str:
    more = f" and {len(ranks) - 8} more" if len(ranks) > 8 else ""
    return ", ".join(map(str, ranks[:8])) + more
