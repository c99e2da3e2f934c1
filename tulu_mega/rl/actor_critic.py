"""The updates of a policy and of the value model that tells what its tokens are worth (PPO)."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import numpy as np

from tulu_mega.config import PpoSettings
from tulu_mega.distributed.collectives import from_lead, gathered_at_lead
from tulu_mega.objectives.gae import Discounts, TokenEstimates, Whitening, whitening
from tulu_mega.records import PackedBatch
from tulu_mega.resilience.guards import Guards
from tulu_mega.rl.batches import scored
from tulu_mega.rl.collector import Collected
from tulu_mega.rl.learner import Learned, Learner, PolicyUpdate, Trained, passes_flops
from tulu_mega.rl.states import estimates, figures, with_estimates
from tulu_mega.train.step_clock import StepClock

Estimated = Mapping[int, tuple[TokenEstimates, np.ndarray]]
"""By response: its estimates and the values of its states."""


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
        gae = settings.gae
        self._discounts = Discounts(gae.gamma, gae.lam, gae.value_lam, gae.adaptive)

    def _flops(self, collected: Collected, repeated: list[int]) -> float:
        passes, scorings = self._settings.train.passes, 1 + (self._policy.reference is not None)
        of_policy = passes_flops(self._policy, collected, repeated, passes, scorings)
        return of_policy + passes_flops(self._value, collected, repeated, passes * self._ppo.value.updates, 1)

    def _learned(self, step: int, batches: list[list[PackedBatch]], tokens: list[int], collected: Collected) -> Learned:
        batches = self._scored(batches, old=True)
        with self._clock.part("scoring"):
            batches = [scored(self._value.engine, part, "old_values_T") for part in batches]
        found, whiten, told, advantages = self._estimated(batches, collected)
        if found:  # only the last stages have anything to lay, and they alone read it
            batches = [[self._with_estimates(pack, found, whiten, collected) for pack in part] for part in batches]
        value_updates, updates, spike = self._updates(step, batches, tokens, collected)
        told = {**told, **self._told(value_updates)}
        return Learned(
            updates, spike, self._differences(batches), value_updates=value_updates, figures=told, advantages=advantages
        )

    def _estimated(
        self, batches: list[list[PackedBatch]], collected: Collected
    ) -> tuple[Estimated, Whitening, dict[str, float], dict[int, float]]:
        """This rank's estimates, all ranks' whitening, and on rank 0 the step's metrics and each response's mean advantage.

        A collective. The order in which advantages are summed is that of the responses' numbers, under every layout.
        """
        mine: Estimated = {}
        packs = list(itertools.chain.from_iterable(batches))
        if all(pack.optional_column("old_values_T") is not None for pack in packs):  # a last pipeline stage
            scores = {one.number: one.advantage for one in collected.responses}
            mine = estimates(packs, scores, self._cut_off(collected), self._settings.policy.beta, self._discounts)
        gathered = gathered_at_lead(mine if self._sees else {})
        every = {number: value for part in gathered for number, value in part.items()}
        ordered = [every[number] for number in sorted(every)]
        whiten = from_lead(whitening([each.advantages for each, _ in ordered]) if ordered else None)
        told = figures(ordered, whiten) if ordered else {}
        advantages = {number: float(whiten(each.advantages).mean()) for number, (each, _) in every.items()}
        return mine, whiten, told, advantages

    def _with_estimates(self, pack: PackedBatch, found: Estimated, whiten: Whitening, collected: Collected) -> PackedBatch:
        policy, most = self._settings.policy, self._settings.sampling.max_tokens
        return with_estimates(pack, found, whiten, self._cut_off(collected), policy.aggregation, most)

    def _cut_off(self, collected: Collected) -> frozenset[int]:
        """Numbers of the responses that filled their room: no state is behind their last token, though it be one that ends."""
        most = self._settings.sampling.max_tokens
        full = (
            one.number
            for one in collected.responses
            if one.response.finish_reason == "length" or one.response.num_trained >= most
        )
        return frozenset(full)

    def _updates(
        self, step: int, batches: list[list[PackedBatch]], tokens: list[int], collected: Collected
    ) -> tuple[list[PolicyUpdate], list[PolicyUpdate], str]:
        """Make the step's updates of the value model and of the policy, until a spike of the policy ends the run."""
        train, value = self._settings.train, self._ppo.value
        of_value: list[PolicyUpdate] = []
        of_policy: list[PolicyUpdate] = []
        begin = step * train.mini_batches * train.passes
        for at, (packs, count) in enumerate(list(zip(batches, tokens, strict=True)) * train.passes):
            made = [
                self._update(self._value, packs, count, (begin + at) * value.updates + again, None)
                for again in range(value.updates)
            ]
            of_value += made
            if step >= value.warmup:
                of_policy.append(self._update(self._policy, packs, count, begin + at, self._guards.allow))
                made.append(of_policy[-1])
            # counted as one, so that the updates of one model do not end a row of the other's that were left out
            told = next((each for each in made if not each.update.finite), made[-1])
            if spike := self._counted(step + 1, told, collected, f"update {at + 1}"):
                return of_value, of_policy, spike
        return of_value, of_policy, ""

    @staticmethod
    def _told(updates: list[PolicyUpdate]) -> dict[str, float]:
        """Metrics of the value model's updates: means over them, the last's learning rate."""
        many = max(len(updates), 1)
        return {
            "value_loss": sum(each.loss.loss for each in updates) / many,
            "value_grad_norm": sum(each.update.grad_norm for each in updates) / many,
            "value_clipped": sum(each.loss.metrics["value_clipped"] for each in updates) / many,
            "value_lr": updates[-1].update.lr if updates else 0.0,
        }
