"""Collects the responses of a step on rank 0 and hands every rank those that are trained on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tulu_mega.distributed.collectives import Crew, from_lead
from tulu_mega.rl import under_way
from tulu_mega.rl.batches import TrainedResponse
from tulu_mega.rl.rollouts import Group, StepRollouts
from tulu_mega.rl.scheduler import Scheduler


@dataclass(frozen=True)
class Collected:
    """The responses of a step."""

    groups: list[list[TrainedResponse]]
    """Responses to train on, by prompt; the same on every rank."""
    rollouts: StepRollouts | None
    """All responses of the step, on rank 0."""

    @property
    def responses(self) -> list[TrainedResponse]:
        """All responses to train on."""
        return [response for group in self.groups for response in group]


class Collector:
    """Has the scheduler, on rank 0, collect a step's responses. Every rank makes one and calls its methods.

    Args:
        crew: the other ranks follow in what generation and judging need them for.
        scheduler: rank 0's.
        beside: whether servers are asked while ranks train (`train.max_policy_lag`).
    """

    def __init__(self, crew: Crew, scheduler: Scheduler | None, beside: bool = False):
        self._crew, self._scheduler, self._beside = crew, scheduler, beside

    def collect(self, step: int) -> Collected:
        """Collect the judged responses that a step trains on.

        Args:
            step: steps done before; the version of the weights.
        """
        rollouts = None

        def work() -> list[list[TrainedResponse]]:
            nonlocal rollouts
            rollouts = self._scheduler.next(version=step)
            return _trained(rollouts)

        groups = self._crew.share(work)
        return Collected(groups, rollouts)

    def quiet(self) -> None:
        """Wait until no server is at work, so that weights may change."""

        def work() -> None:
            self._scheduler.quiet()

        if self._beside:
            self._crew.share(work)

    def state(self) -> dict[str, Any]:
        """Return the state that a checkpoint keeps, from rank 0. A collective."""
        return from_lead(self._scheduler.state if self._scheduler else None)

    def files(self) -> dict[str, bytes]:
        """Return what a checkpoint keeps beside it, by file name: what is answered and not trained on. Rank 0 alone has any."""
        return under_way.files(self._scheduler) if self._scheduler else {}


def numbered(rollouts: StepRollouts) -> Iterator[tuple[int, Group, int]]:
    """Number the responses that a step may train on: number in the step, group, place in the group."""
    places = ((group, at) for group in rollouts.groups for at in range(len(group.judged)))
    return ((number, group, at) for number, (group, at) in enumerate(places))


def _trained(rollouts: StepRollouts) -> list[list[TrainedResponse]]:
    groups: dict[int, list[TrainedResponse]] = {}
    for number, group, at in numbered(rollouts):
        if group.advantages.trained[at]:
            trained = TrainedResponse(number, group.judged[at].response, group.advantages.advantages[at])
            groups.setdefault(group.place, []).append(trained)
    return list(groups.values())
