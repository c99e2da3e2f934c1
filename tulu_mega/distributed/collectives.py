"""Failing together: what goes wrong on one rank ends the step on all of them, and nobody waits for a rank that is gone."""

from __future__ import annotations

import contextlib
import functools
import socket
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint.api import CheckpointException

from tulu_mega.errors import UserError

T = TypeVar("T")


@contextlib.contextmanager
def together(what: str) -> Iterator[None]:
    """Runs a block on every rank of the world; where it fails on any, it fails on all. A barrier at its end.

    The block may hold collectives only where they cannot be skipped by a failure before them.

    Args:
        what: begins the message, e.g. ``the checkpoint could not be written``.

    Raises:
        UserError: the same on every rank, with each different problem told once.
    """
    problem = None
    try:
        yield
    except UserError as error:
        problem = error.problems
    except (Exception, CheckpointException) as error:  # torch's is no Exception
        problem = [f"{what}: {reason(error)}"]
    if found := list(dict.fromkeys(each for mine in gathered(problem) for each in mine or ())):
        raise UserError(found)


def from_lead(value: T) -> T:
    """Return rank 0's value on every rank; the values of the other ranks are ignored."""
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def awaited_from_lead(value: T) -> T:
    """Do as `from_lead` where rank 0 may come minutes later: the other ranks sleep, so that servers may use their GPUs."""
    box, world = [value], dist.group.WORLD
    dist.broadcast_object_list(box, src=0, group=_sleeping(world) if dist.get_backend() == "nccl" else world)
    return box[0]


@functools.cache
def _sleeping(world: ProcessGroup) -> ProcessGroup:
    """Return a gloo group of all ranks: in one of NCCL's collectives a GPU spins until the last rank has come.

    Every rank makes the group, at its first use.
    """
    return dist.new_group(backend="gloo", timeout=world._get_backend(torch.device("cuda")).options._timeout)


def gathered(value: T) -> list[T]:
    """Return the values of all ranks, by rank, on every rank."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def gathered_at_lead(value: T) -> list[T]:
    """Return the values of all ranks, by rank, on rank 0; an empty list on the others."""
    values: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(value, values)
    return values or []


def same_everywhere(what: str, digest: str) -> None:
    """Check that all ranks have the same digest. Every rank calls it.

    Args:
        what: names the thing that the digest is of, such as ``the data in DIRECTORY``.

    Raises:
        UserError: on every rank, naming those that have another than rank 0.
    """
    told = gathered((digest, socket.gethostname()))
    first, _ = told[0]
    odd = [f"rank {rank} on {host} ({there[:12]})" for rank, (there, host) in enumerate(told) if there != first]
    if odd:
        more = f" and {len(odd) - 4} more" if len(odd) > 4 else ""
        raise UserError(
            f"{what}: {', '.join(odd[:4])}{more} read other content than rank 0 on {told[0][1]} ({first[:12]}); all "
            "nodes have to see the same files. If they do, start again: a network file system may show old ones for a minute"
        )


class Crew:
    """Rank 0 leads, the others follow: what all ranks have to do together while rank 0 alone knows what comes next.

    >>> crew = Crew({"push": sync.push})
    >>> batch = crew.share(lambda: collect(push=partial(crew.do, "push")))

    Args:
        actions: by name, what every rank does when rank 0 says so; what it returns on rank 0 is given back there.
    """

    _END, _FAILED = "", "failed"

    def __init__(self, actions: Mapping[str, Callable[[Any], Any]]):
        self._actions = actions
        self._raised: UserError | None = None
        """the exception that an action raised, on rank 0"""

    def do(self, name: str, argument: Any = None) -> Any:
        """Run an action on every rank. Rank 0 calls it while the other ranks follow."""
        awaited_from_lead((name, argument))
        try:
            return self._actions[name](argument)
        except UserError as error:
            self._raised = error
            raise

    def share(self, work: Callable[[], T]) -> T:
        """Rank 0 does the work, of which actions may be a part, the others take part in these; every rank gets its result.

        Raises:
            UserError: the same on every rank, what the work or an action of it raises; actions raise it on every rank. What else
                the work raises ends rank 0's process; whoever started the ranks ends the others.
        """
        if dist.get_rank() == 0:
            try:
                return awaited_from_lead((self._END, work()))[1]
            except UserError as error:
                if error is not self._raised:  # else they have raised it too
                    awaited_from_lead((self._FAILED, error))
                raise
        while True:
            name, argument = awaited_from_lead(None)
            if name == self._END:
                return argument
            if name == self._FAILED:
                raise argument
            self._actions[name](argument)


def reason(error: BaseException) -> str:
    """Describe the cause of an error in one line, without the wrappers that libraries put around it."""
    error = root(error)
    if isinstance(error, OSError) and error.strerror:
        return error.strerror + (f" ({error.filename})" if error.filename else "")
    text = str(error).strip()
    return text.splitlines()[-1] if text else type(error).__name__


def root(error: BaseException) -> BaseException:
    """Return the operating system's error that led to this error; where there is none, the first cause."""
    chain = [error]
    while before := _before(chain[-1]):
        chain.append(before)
    caused = error
    while caused.__cause__ is not None or isinstance(caused, CheckpointException):
        caused = _before(caused)
    return next((each for each in chain if isinstance(each, OSError)), caused)


def _before(error: BaseException) -> BaseException | None:
    if isinstance(error, CheckpointException):
        return next(iter(error.failures.values()))[0]
    return error.__cause__ or (None if error.__suppress_context__ else error.__context__)
