"""Collects the responses of a step on rank 0 and hands every rank those that are trained on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tulu_mega.distributed.collectives import Crew, from_lead
from tulu_mega.rl.batches import TrainedResponse
from tulu_mega.rl.scheduler import Group, Scheduler, StepRollouts


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
    """

    def __init__(self, crew: Crew, scheduler: Scheduler | None):
        self._crew, self._scheduler = crew, scheduler
        self._before: dict[str, Any] | None = None

    def collect(self, step: int) -> Collected:
        """Collect judged responses of the newest weights.

        Args:
            step: steps done before; the version of the weights.
        """
        rollouts = None
        if self._scheduler:
            self._before = self._scheduler.state

        def work() -> list[list[TrainedResponse]]:
            nonlocal rollouts
            rollouts = self._scheduler.next(version=step)
            return _trained(rollouts)

        groups = self._crew.share(work)
        return Collected(groups, rollouts)

    def state(self) -> dict[str, Any]:
        """Return the state that a checkpoint keeps, from rank 0. A collective."""
        return from_lead(self._scheduler.state if self._scheduler else None)

    def state_before(self) -> dict[str, Any]:
        """As `state`, of before the step that was collected last: one that came to no end is collected anew from there."""
        return from_lead(self._before)


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
