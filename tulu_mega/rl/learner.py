"""The updates of a policy from a step's responses."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from tulu_mega.config import PolicyRunSettings
from tulu_mega.distributed.collectives import gathered_at_lead
from tulu_mega.distributed.topology import Topology
from tulu_mega.errors import UserError
from tulu_mega.layout.flops import training_flops
from tulu_mega.records import PackedBatch
from tulu_mega.resilience.guards import Guards
from tulu_mega.rl import journal
from tulu_mega.rl.batches import Compared, differences, packed, scored, split, with_column
from tulu_mega.rl.collector import Collected
from tulu_mega.train.adapter_reference import AdapterReference
from tulu_mega.train.batch_loss import BatchLoss
from tulu_mega.train.engine import Engine, Objective, Update
from tulu_mega.train.step_clock import StepClock


@dataclass(frozen=True)
class PolicyUpdate:
    """One optimizer step, the same on every rank."""

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
    differences: dict[int, Compared] = field(default_factory=dict)
    """On rank 0, by response, how far sampler and trainer are apart."""
    packed_tokens: int = 0
    """Tokens of this data-parallel rank's packs, padding included."""
    own_tokens: int = 0
    """Tokens of this data-parallel rank's packs without padding."""
    repeated: list[int] = field(default_factory=list)
    """Lengths of the prompts, on all ranks, that were not repeated because their pack had them already."""
    value_updates: list[PolicyUpdate] = field(default_factory=list)
    """Those of the value model, where there is one."""
    flops: float = 0.0
    """FLOP of the updates and scorings, all ranks together."""
    figures: Mapping[str, float] = field(default_factory=dict)
    """Metrics of the step that an algorithm has of its own; rank 0's count."""
    advantages: Mapping[int, float] | None = None
    """On rank 0, by response, its mean advantage, where tokens have their own; None where a response has one for all."""


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


@dataclass(frozen=True)
class Trained:
    """An engine in training and what it minimises."""

    engine: Engine
    objective: Objective
    reference: Engine | AdapterReference | None = None
    """Of the model whose log-probabilities are compared with, if any."""


class Learner:
    """What learners of every algorithm share: packs of a step's responses, and one update. Every rank makes one.

    Args:
        policy: the model that answers.
        settings: of the run.
        guards: judge each update.
        clock: measures the parts of a step.
    """

    ends = False
    """Whether packs hold the last token of each response, too."""

    def __init__(self, policy: Trained, settings: PolicyRunSettings, guards: Guards, clock: StepClock):
        self._policy, self._settings, self._guards, self._clock = policy, settings, guards, clock
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
        with self._clock.part("data"):
            mini_batches = split(collected.groups, self._settings.train.mini_batches)
            tokens = [sum(one.response.num_trained for one in part) for part in mini_batches]
            capacity = self._settings.data.pack_length or self._settings.longest
            share = self._settings.train.share_prompts
            parts = [packed(self._policy.engine, part, capacity, share, self.ends) for part in mini_batches]
        learned = self._learned(step, [part.packs for part in parts], tokens, collected)
        return replace(
            learned,
            packed_tokens=sum(len(pack.tokens_T) for part in parts for pack in part.packs),
            own_tokens=sum(part.own_tokens for part in parts),
            repeated=[length for part in parts for length in part.repeated],
            flops=self._flops(collected, [length for part in parts for length in part.repeated]),
        )

    def _flops(self, collected: Collected, repeated: list[int]) -> float:
        """FLOP of a step's updates and scorings, all ranks together.

        Args:
            repeated: lengths of the prompts that were not repeated.
        """
        raise NotImplementedError

    def _learned(self, step: int, batches: list[list[PackedBatch]], tokens: list[int], collected: Collected) -> Learned:
        """Make the updates of a step.

        Args:
            step: steps done before.
            batches: each mini-batch's packs.
            tokens: each mini-batch's trained tokens over all ranks.
            collected: the responses of the step.
        """
        raise NotImplementedError

    def _scored(self, batches: list[list[PackedBatch]], old: bool) -> list[list[PackedBatch]]:
        """Add the reference's log-probabilities where there is one and, if `old`, those of the weights before the step."""
        with self._clock.part("scoring"):
            if self._policy.reference:
                batches = [scored(self._policy.reference, part, "ref_logp_T") for part in batches]
            if old:
                batches = [scored(self._policy.engine, part, "old_logp_T") for part in batches]
        return batches

    def _update(
        self,
        trained: Trained,
        packs: list[PackedBatch],
        tokens: int,
        number: int,
        allow: Callable[[float, float], bool] | None,
        seen: list[Tensor] | None = None,
    ) -> PolicyUpdate:
        """Make one update.

        Args:
            number: of the engine's updates, from 0.
            tokens: trained tokens over all ranks.
            allow: judges it, if anybody does.
            seen: gets the log-probabilities of the forward passes.
        """
        with self._clock.part("forward_backward"), self._guards.working():
            loss = trained.engine.forward_backward(packs, trained.objective, seen)
        launched = time.perf_counter()
        with self._clock.part("optimizer"), self._guards.working():
            update = trained.engine.optimizer_step(number, loss, allow)
        self._clock.move(update.known - launched, "optimizer", "forward_backward")  # the device was still at it
        return PolicyUpdate(loss.read(), tokens, update)

    def _counted(self, step: int, made: PolicyUpdate, collected: Collected, name: str) -> str:
        """Have the guards count an update; the description of the spike that ends the run, if it is one.

        Args:
            step: from 1.
            collected: names the rows of an update that is left out.
            name: of the update, for people.
        """
        update = made.update
        spike = self._guards.after_update(
            step, update.finite, made.loss.loss, update.grad_norm, lambda: _rows(collected), f"{name} of step {step}"
        )
        return f"{name} of step {step}: {spike}" if spike else ""

    def _differences(self, batches: Iterable[list[PackedBatch]]) -> dict[int, Compared]:
        """Gather the comparisons on rank 0 from the ranks that see log-probabilities. A collective."""
        mine = differences(itertools.chain.from_iterable(batches)) if self._sees else {}
        found = {number: value for part in gathered_at_lead(mine) for number, value in part.items()}
        return dict(sorted(found.items()))

    @property
    def _sees(self) -> bool:
        """Whether this rank is the one of its replica that tells what the model's output was."""
        return tells(self._policy.engine.topology)


def tells(place: Topology) -> bool:
    """Whether a rank is the one of its replica that tells what a model's output was."""
    return place.reports_loss and place.context_rank == 0


def passes_flops(trained: Trained, collected: Collected, repeated: list[int], passes: int, scorings: int) -> float:
    """FLOP of some forward and backward passes over a step's responses, and of forward passes alone, a third of that each.

    Args:
        repeated: as for `Learner`.
        scorings: forward passes alone.
    """
    hf, lengths = trained.engine.hf.to_dict(), [one.response.num_tokens for one in collected.responses]

    def once(frozen: bool) -> float:
        return training_flops(hf, lengths, frozen) - training_flops(hf, repeated, frozen)

    return passes * once(trained.engine.lora is not None) + scorings * once(False) / 3


class PolicyLearner(Learner):
    """Updates a policy alone: each mini-batch of a step in turn, as often as there are passes."""

    def _flops(self, collected: Collected, repeated: list[int]) -> float:
        passes = self._settings.train.passes
        updates = min(self._settings.train.mini_batches, len(collected.groups)) * passes
        scorings = (updates > 1) + (self._policy.reference is not None)
        return passes_flops(self._policy, collected, repeated, passes, scorings)

    def _learned(self, step: int, batches: list[list[PackedBatch]], tokens: list[int], collected: Collected) -> Learned:
        once = len(batches) * self._settings.train.passes == 1  # the update's own forward pass then gives the old weights'
        batches = self._scored(batches, old=not once)
        seen: list[Tensor] | None = [] if once else None
        updates, spike = self._updates(step, list(zip(batches, tokens, strict=True)), seen, collected)
        if once:
            batches = [with_column(batches[0], "old_logp_T", seen)]
        return Learned(updates, spike, self._differences(batches))

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
            updates.append(self._update(self._policy, packs, tokens, begin + at, self._guards.allow, seen))
            spike = self._counted(step + 1, updates[-1], collected, f"update {at + 1}")
            if spike:
                return updates, spike
        return updates, ""


def _rows(collected: Collected) -> list[dict[str, Any]]:
    return [{"row": group.place, "where": group.prompt.where} for group in collected.rollouts.groups]
