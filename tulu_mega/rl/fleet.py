"""The servers as a trainer sees them: of the weights it last pushed, or started again and given them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch.distributed as dist

from tulu_mega.config import RolloutSettings
from tulu_mega.distributed.collectives import awaited_from_lead
from tulu_mega.errors import UserError
from tulu_mega.inference.addresses import ask_restart, attached
from tulu_mega.inference.client import RolloutClient
from tulu_mega.inference.sampling import Sampling
from tulu_mega.records import Response
from tulu_mega.weight_transfer.attach import Connection
from tulu_mega.weight_transfer.push import SyncReport, push
from tulu_mega.weight_transfer.server import ServerAddress, ServerFailure


class CutOff(UserError):
    """No server is left that answers: on every rank, and the trainer itself is as it was."""


class Fleet:
    """Servers and the connection that carries weights to them. A context manager; every rank has one.

    Args:
        connect: makes the connection to servers; every rank calls it.
        settings: of the rollouts.
        run_dir: where the launcher says which servers there are.
    """

    def __init__(
        self,
        connect: Callable[[list[ServerAddress]], Connection],
        settings: RolloutSettings,
        run_dir: Path,
    ):
        self._connect, self._settings, self._run_dir = connect, settings, run_dir
        self._addresses: list[ServerAddress] = []
        self._connection: Connection | None = None
        self._client: RolloutClient | None = None
        self._note = ""

    def __enter__(self) -> Fleet:
        return self

    def __exit__(self, *_: object) -> None:
        self._disconnect()

    def push(self, version: int) -> SyncReport:
        """Every server gets this trainer's weights; one that cannot take them is started again first. Every rank calls it.

        Raises:
            CutOff: on every rank, a server that is not ours to start again fails, or one that fails each time.
            UserError: on every rank, this trainer could not send, or a server is none that it can send to.
        """
        for _ in range(self._settings.restarts + 1):
            self._reconnect()
            report = push(self._connection, version)
            if not report.failed:
                return report
            self._mark("having servers started again")
            if dist.get_rank() == 0:
                self._restart(report.failed)
        raise CutOff(
            f"the weights of version {version} did not reach {', '.join(report.failed)} in {self._settings.restarts + 1} "
            f"attempts: {'; '.join(report.failed.values())}; see the servers' logs"
        )

    def _mark(self, what: str) -> None:
        """For the watchdog: each of these may take as long as a time-out of its own."""
        if self._connection is not None:
            self._connection.sender.at(what)

    def _restart(self, failed: dict[str, str]) -> None:
        for address in self._addresses:
            if address.url in failed:
                print(f"{address.url}: {failed[address.url]}; it is started again", flush=True)
                ask_restart(self._run_dir, address, failed[address.url], remote=bool(self._settings.urls))

    def _reconnect(self) -> None:
        """Follows the servers where they are now."""
        addresses, problems = awaited_from_lead(self._attached() if dist.get_rank() == 0 else None)
        if problems:
            raise CutOff(problems)
        if self._connection is not None and addresses == self._addresses:
            return
        self._disconnect()
        self._addresses = addresses
        try:
            self._connection = self._connect(self._addresses)
        except UserError as error:  # on every rank
            raise CutOff(error.problems) from None
        if dist.get_rank() == 0:
            self._client = RolloutClient(self._addresses, self._settings, self._connection.adapter)
            if (note := self._connection.streams.note) and note != self._note:
                print(note, flush=True)
            self._note = note

    def _attached(self) -> tuple[list[ServerAddress], list[str]]:
        """The servers, or why there are none, which every rank is to hear."""
        try:
            return attached(self._settings, self._run_dir), []
        except UserError as error:
            return [], error.problems

    def _disconnect(self) -> None:
        for each in (self._connection, self._client):
            if each is not None:
                each.close()
        self._connection = self._client = None


class FleetClient:
    """Rank 0's way to have a fleet's servers answer prompts.

    Args:
        fleet: the servers.
        repair: has every rank call :meth:`Fleet.push`, with the version of the weights, while the others wait for rank 0.
    """

    def __init__(self, fleet: Fleet, repair: Callable[[int], SyncReport]):
        self._fleet, self._repair = fleet, repair
        self._failures = 0
        """of `attempt`, in a row"""

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        version: int,
        numbers: Sequence[int] | None = None,
        done: Callable[[int, list[Response]], None] | None = None,
    ) -> list[list[Response]]:
        """As :meth:`RolloutClient.generate`; where no server is left to answer, they are started again and asked anew.

        Raises:
            CutOff: they fail each time, or are not ours to start again.
        """
        fleet = self._fleet
        for attempt in range(fleet._settings.restarts + 1):
            try:
                return fleet._client.generate(prompts, sampling, version, numbers, done)
            except ServerFailure as failure:
                if attempt == fleet._settings.restarts:
                    raise CutOff(f"{failure}; it failed {attempt + 1} times, see the servers' logs") from None
                fleet._mark("having servers started again")
                fleet._restart({failure.url: failure.reason})
                self._repair(version)
                fleet._mark("generation")
        raise AssertionError("unreachable")

    def attempt(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        version: int,
        numbers: Sequence[int] | None = None,
        done: Callable[[int, list[Response]], None] | None = None,
    ) -> list[list[Response]]:
        """As :meth:`RolloutClient.generate`, in whichever thread, while the ranks do something else; not while they push.

        Raises:
            ServerFailure: no server is left to answer.
        """
        answers = self._fleet._client.generate(prompts, sampling, version, numbers, done)
        self._failures = 0
        return answers

    def failed(self, failure: ServerFailure) -> None:
        """Have a server started again that failed an `attempt`; the next push gives it weights.

        Raises:
            CutOff: that happened too often in a row.
        """
        self._failures += 1
        if self._failures > self._fleet._settings.restarts:
            raise CutOff(f"{failure}; it failed {self._failures} times, see the servers' logs")
        print(f"{failure}; its prompts are asked again, of the next weights", flush=True)
        self._fleet._mark("having servers started again")
        self._fleet._restart({failure.url: failure.reason})
