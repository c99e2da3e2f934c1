"""The updates of a policy and of the value model that tells what its tokens are worth (PPO)."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import numpy as np

from tulu_mega.config import PpoSettings
from tulu_mega.distributed.collectives import from_lead, gathered_at_lead
from tulu_mega.layout.packing_rules import pack_alignment
from tulu_mega.objectives.gae import Discounts, TokenEstimates, Whitening, whitening
from tulu_mega.records import PackedBatch
from tulu_mega.resilience.guards import Guards
from tulu_mega.rl.batches import packed, scored, split
from tulu_mega.rl.collector import Collected
from tulu_mega.rl.learner import Learned, Learner, PolicyUpdate, Trained, passes_flops, tells
from tulu_mega.rl.states import estimates, figures, values_of, with_estimates, with_values
from tulu_mega.train.step_clock import StepClock

Estimated = Mapping[int, tuple[TokenEstimates, np.ndarray]]
"""For each response, by number: its estimates and the values of its states."""


class ActorCritic(Learner):
    """Updates the value model and the policy on each mini-batch, the value model first, as often as there are passes.

    Values, log-probabilities, advantages and returns are those of the weights before the step, in all its passes.

    Args:
        policy, guards, clock: as for `Learner`.
        value: the value model.
        settings: of the run.
    """

    ends = True

    def __init__(self, policy: Trained, value: Trained, settings: PpoSettings, guards: Guards, clock: StepClock):
        super().__init__(policy, settings, guards, clock)
        self._value, self._ppo = value, settings
        self._repeated_of_value: list[int] = []
        gae = settings.gae
        self._discounts = Discounts(gae.gamma, gae.lam, gae.value_lam, gae.adaptive)

    def _flops(self, collected: Collected, repeated: list[int]) -> float:
        passes, scorings = self._settings.train.passes, 1 + (self._policy.reference is not None)
        of_policy = passes_flops(self._policy, collected, repeated, passes, scorings)
        repeated = self._repeated_of_value if self._apart else repeated
        return of_policy + passes_flops(self._value, collected, repeated, passes * self._ppo.value.updates, 1)

    def _learned(self, step: int, batches: list[list[PackedBatch]], tokens: list[int], collected: Collected) -> Learned:
        of_value = self._packs_of_value(batches, collected)
        batches = self._scored(batches, old=True)
        with self._clock.part("scoring"):
            of_value = [scored(self._value.engine, part, "old_values_T") for part in of_value]
        batches = self._with_values(batches, of_value, collected)
        found, whiten, told, advantages = self._estimated(batches, collected)
        batches, of_value = (self._with_estimates(parts, found, whiten, collected) for parts in (batches, of_value))
        value_updates, updates, spike = self._updates(step, batches, of_value, tokens, collected)
        told = {**told, **self._told(value_updates)}
        return Learned(
            updates, spike, self._differences(batches), value_updates=value_updates, figures=told, advantages=advantages
        )

    @property
    def _apart(self) -> bool:
        """Return whether the value model's layout needs packs of its own."""
        mine, theirs = self._value.engine, self._policy.engine
        return mine.topology != theirs.topology or pack_alignment(mine.settings) != pack_alignment(theirs.settings)

    def _packs_of_value(self, batches: list[list[PackedBatch]], collected: Collected) -> list[list[PackedBatch]]:
        """The mini-batches as the value model's layout has them.

        Args:
            batches: as the policy's has them.
        """
        if not self._apart:
            return batches
        with self._clock.part("data"):
            train, capacity = self._settings.train, self._settings.data.pack_length or self._settings.longest
            parts = split(collected.groups, train.mini_batches)
            made = [packed(self._value.engine, part, capacity, train.share_prompts, self.ends) for part in parts]
        self._repeated_of_value = [length for part in made for length in part.repeated]
        return [part.packs for part in made]

    def _with_values(
        self, batches: list[list[PackedBatch]], of_value: list[list[PackedBatch]], collected: Collected
    ) -> list[list[PackedBatch]]:
        """The policy's packs with the values of their states, which go from layout to layout by response. A collective."""
        cut_off = self._cut_off(collected)
        place = self._value.engine.topology
        mine = values_of(itertools.chain.from_iterable(of_value), cut_off) if tells(place) else {}
        every = {number: values for part in gathered_at_lead(mine) for number, values in part.items()}
        every = from_lead(every)
        return [[with_values(pack, every, cut_off) for pack in part] for part in batches]

    def _estimated(
        self, batches: list[list[PackedBatch]], collected: Collected
    ) -> tuple[Estimated, Whitening, dict[str, float], dict[int, float]]:
        """The estimates of all responses, their whitening, and on rank 0 the step's metrics and each response's mean advantage.

        A collective. The order in which advantages are summed is that of the responses' numbers, under every layout.
        """
        mine: Estimated = {}
        packs = list(itertools.chain.from_iterable(batches))
        if self._sees:
            scores = {one.number: one.advantage for one in collected.responses}
            mine = estimates(packs, scores, self._cut_off(collected), self._settings.policy.beta, self._discounts)
        gathered = gathered_at_lead(mine)
        every = from_lead({number: value for part in gathered for number, value in part.items()})
        ordered = [every[number] for number in sorted(every)]
        whiten = whitening([each.advantages for each, _ in ordered])
        told = figures(ordered, whiten)
        advantages = {number: float(whiten(each.advantages).mean()) for number, (each, _) in every.items()}
        return every, whiten, told, advantages

    def _with_estimates(
        self, batches: list[list[PackedBatch]], found: Estimated, whiten: Whitening, collected: Collected
    ) -> list[list[PackedBatch]]:
        policy, most, cut_off = self._settings.policy, self._settings.sampling.max_tokens, self._cut_off(collected)
        return [[with_estimates(pack, found, whiten, cut_off, policy.aggregation, most) for pack in part] for part in batches]

    def _cut_off(self, collected: Collected) -> frozenset[int]:
        """Numbers of the responses that reached the longest length: no state follows their last token, even if it ends a
        response."""
        most = self._settings.sampling.max_tokens
        full = (
            one.number
            for one in collected.responses
            if one.response.finish_reason == "length" or one.response.num_trained >= most
        )
        return frozenset(full)

    def _updates(
        self,
        step: int,
        batches: list[list[PackedBatch]],
        of_value: list[list[PackedBatch]],
        tokens: list[int],
        collected: Collected,
    ) -> tuple[list[PolicyUpdate], list[PolicyUpdate], str]:
        """Make the step's updates of the value model and of the policy, until a spike of the policy ends the run.

        Args:
            batches, of_value: each mini-batch's packs for the policy and for the value model.
        """
        train, value = self._settings.train, self._ppo.value
        value_updates: list[PolicyUpdate] = []
        updates: list[PolicyUpdate] = []
        begin = step * train.mini_batches * train.passes
        for at, (packs, states, count) in enumerate(list(zip(batches, of_value, tokens, strict=True)) * train.passes):
            made = [
                self._update(self._value, states, count, (begin + at) * value.updates + again, None)
                for again in range(value.updates)
            ]
            value_updates += made
            if step >= value.warmup:
                updates.append(self._update(self._policy, packs, count, begin + at, self._guards.allow))
                made.append(updates[-1])
            # counted as one, so that the updates of one model do not end a row of the other's that were left out
            told = next((each for each in made if not each.update.finite), made[-1])
            if spike := self._counted(step + 1, told, collected, f"update {at + 1}"):
                return value_updates, updates, spike
        return value_updates, updates, ""

    @staticmethod
    def _told(updates: list[PolicyUpdate]) -> dict[str, float]:
        """Return metrics of the value model's updates: means over the updates, and the last learning rate."""
        many = max(len(updates), 1)
        return {
            "value_loss": sum(each.loss.loss for each in updates) / many,
            "value_grad_norm": sum(each.update.grad_norm for each in updates) / many,
            "value_clipped": sum(each.loss.metrics["value_clipped"] for each in updates) / many,
            "value_lr": updates[-1].update.lr if updates else 0.0,
        }
