"""Failing together: what goes wrong on one rank ends the step on all of them, and nobody waits for a rank that is gone."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from tulu_mega.errors import UserError


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
    problems: list[list[str] | None] = [None] * dist.get_world_size()
    dist.all_gather_object(problems, problem)
    if found := list(dict.fromkeys(each for mine in problems for each in mine or ())):
        raise UserError(found)


def reason(error: BaseException) -> str:
    """What is behind the wrappers that libraries put around an error, in one line."""
    error = root(error)
    if isinstance(error, OSError) and error.strerror:
        return error.strerror + (f" ({error.filename})" if error.filename else "")
    text = str(error).strip()
    return text.splitlines()[-1] if text else type(error).__name__


def root(error: BaseException) -> BaseException:
    """The operating system's error, if one led to this; else the first cause."""
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
