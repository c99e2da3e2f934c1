"""The updates of a policy from a step's responses."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from tulu_mega.config import GrpoSettings
from tulu_mega.distributed.collectives import gathered_at_lead
from tulu_mega.errors import UserError
from tulu_mega.objectives.policy import PolicyObjective
from tulu_mega.records import PackedBatch
from tulu_mega.resilience.guards import Guards
from tulu_mega.rl import journal
from tulu_mega.rl.batches import differences, packed, scored, split, with_column
from tulu_mega.rl.collector import Collected
from tulu_mega.train.batch_loss import BatchLoss
from tulu_mega.train.engine import Engine, Update
from tulu_mega.train.step_clock import StepClock


@dataclass(frozen=True)
class PolicyUpdate:
    """One optimizer step of the policy, the same on every rank."""

    loss: BatchLoss
    tokens: int
    """Tokens trained on, over all ranks."""
    update: Update


@dataclass(frozen=True)
class Learned:
    """The result of a step's updates; a step with nothing to learn from has none."""

    updates: list[PolicyUpdate] = field(default_factory=list)
    spike: str = ""
    """Description of the spike that ends the run; the update with the spike and the step's later ones were left out."""
    differences: dict[int, tuple[float, float]] = field(default_factory=dict)
    """On rank 0, by response, mean and largest |log-probability by the sampler less that by the trainer|."""
    packed_tokens: int = 0
    """Tokens of this data-parallel rank's packs, padding included."""
    own_tokens: int = 0
    """Tokens of this data-parallel rank's packs without padding."""
    repeated: list[int] = field(default_factory=list)
    """Lengths of the prompts, on all ranks, that were not repeated because their pack had them already."""


@dataclass
class EmptySteps:
    """The count of steps in a row without anything to learn from."""

    allowed: int
    """Empty steps in a row that end the run."""
    rollouts: Path
    """Directory of the responses, for the error message."""
    in_a_row: int = 0

    def note(self, step: int, empty: bool) -> None:
        """Count a step (from 1).

        Raises:
            UserError: too many steps in a row were empty.
        """
        self.in_a_row = self.in_a_row + 1 if empty else 0
        if self.in_a_row >= self.allowed:
            raise UserError(
                f"stopped at step {step}: in {self.in_a_row} steps in a row no prompt had responses of different "
                f"rewards, so there is nothing to learn from; look at {self.rollouts}: the task may be too hard, too easy, or "
                "judged wrongly"
            )


class Learner:
    """Updates the policy: each mini-batch of a step in turn, as often as there are passes. Every rank makes one.

    Args:
        engine: the policy's.
        reference: the reference model's engine, if the objective reads its log-probabilities.
        objective: the policy's loss.
        settings: of the run.
        guards: judge each update.
        clock: measures the parts of a step.
    """

    def __init__(
        self,
        engine: Engine,
        reference: Engine | None,
        objective: PolicyObjective,
        settings: GrpoSettings,
        guards: Guards,
        clock: StepClock,
    ):
        self._engine, self._reference, self._objective, self._settings = engine, reference, objective, settings
        self._guards, self._clock = guards, clock
        self._empty = EmptySteps(settings.train.max_skipped, Path(settings.run_dir, journal.FOLDER))

    @property
    def state(self) -> dict[str, Any]:
        """The learner's entries in the state of a checkpoint."""
        return {"empty_in_a_row": self._empty.in_a_row}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from the state of a checkpoint."""
        self._empty.in_a_row = state["empty_in_a_row"]

    def learn(self, step: int, collected: Collected) -> Learned:
        """Make the updates of a step. Every rank calls it.

        Args:
            step: steps done before.
            collected: the responses of the step.

        Raises:
            UserError: on every rank, too many steps in a row had nothing to learn from, or too many updates were not finite.
        """
        self._empty.note(step + 1, not collected.groups)
        if not collected.groups:
            return Learned()
        train = self._settings.train
        with self._clock.part("data"):
            mini_batches = split(collected.groups, train.mini_batches)
            tokens = [sum(one.response.num_trained for one in part) for part in mini_batches]
            capacity = self._settings.data.pack_length or self._settings.longest
            parts = [packed(self._engine, part, capacity, train.share_prompts) for part in mini_batches]
        once = len(parts) * train.passes == 1  # the update's own forward pass then gives the old weights' log-probabilities
        batches = self._scored([part.packs for part in parts], old=not once)
        seen: list[Tensor] | None = [] if once else None
        updates, spike = self._updates(step, list(zip(batches, tokens, strict=True)), seen, collected)
        if once:
            batches = [with_column(batches[0], "old_logp_T", seen)]
        return Learned(
            updates,
            spike,
            self._differences(batches),
            packed_tokens=sum(len(pack.tokens_T) for part in parts for pack in part.packs),
            own_tokens=sum(part.own_tokens for part in parts),
            repeated=[length for part in parts for length in part.repeated],
        )

    def _scored(self, batches: list[list[PackedBatch]], old: bool) -> list[list[PackedBatch]]:
        """Add the reference's log-probabilities where there is one and, if `old`, those of the weights before the step."""
        with self._clock.part("scoring"):
            if self._reference:
                batches = [scored(self._reference, part, "ref_logp_T") for part in batches]
            if old:
                batches = [scored(self._engine, part, "old_logp_T") for part in batches]
        return batches

    def _updates(
        self, step: int, parts: list[tuple[list[PackedBatch], int]], seen: list[Tensor] | None, collected: Collected
    ) -> tuple[list[PolicyUpdate], str]:
        """Make the updates in turn, until a spike ends the run, which is returned as text.

        Args:
            step: steps done before.
            parts: each mini-batch and its trained tokens over all ranks.
            seen: gets the log-probabilities of the forward passes.
            collected: names the rows of an update that is skipped.
        """
        train, updates = self._settings.train, []
        begin = step * train.mini_batches * train.passes
        for at, (packs, tokens) in enumerate(parts * train.passes):
            with self._clock.part("forward_backward"), self._guards.working():
                loss = self._engine.forward_backward(packs, self._objective, seen)
            launched = time.perf_counter()
            with self._clock.part("optimizer"), self._guards.working():
                update = self._engine.optimizer_step(begin + at, loss, self._guards.allow)
            self._clock.move(update.known - launched, "optimizer", "forward_backward")  # the device was still at it
            updates.append(PolicyUpdate(loss.read(), tokens, update))
            name = f"update {at + 1} of step {step + 1}"
            spike = self._guards.after_update(
                step + 1, update.finite, loss.loss, update.grad_norm, lambda: _rows(collected), name
            )
            if spike:
                return updates, f"{name}: {spike}"
        return updates, ""

    def _differences(self, batches: Iterable[list[PackedBatch]]) -> dict[int, tuple[float, float]]:
        """Gather the differences on rank 0 from the ranks that see log-probabilities. A collective."""
        place = self._engine.topology
        sees = place.reports_loss and place.context_rank == 0
        mine = differences(itertools.chain.from_iterable(batches)) if sees else {}
        return {number: value for part in gathered_at_lead(mine) for number, value in part.items()}


def _rows(collected: Collected) -> list[dict[str, Any]]:
    return [{"row": group.place, "where": group.prompt.where} for group in collected.rollouts.groups]
