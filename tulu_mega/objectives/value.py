"""What a value model minimises: its distance from the returns (PPO: Schulman et al., arXiv 1707.06347)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tulu_mega.records import LossOutput, PackedBatch, Reads, TokenOutput


@dataclass(frozen=True)
class ValueObjective:
    """Mean over states of ``coefficient / 2 * max((v - R)^2, (clip(v, v_old - range, v_old + range) - R)^2)``.

    Without a range ``coefficient / 2 * (v - R)^2``. The clipped form is that of Schulman's `baselines` (ppo2), which Tulu 3 took.
    Each state has a weight in the mean, which the batch brings: `rl.states` says which.
    """

    reads: ClassVar[Reads] = Reads.TOKENS
    reported: ClassVar[tuple[str, ...]] = ("value_clipped",)
    largest: ClassVar[tuple[str, ...]] = ()

    coefficient: float = 0.1
    clip: float = 0.2
    """how far a value may move from that before the updates and still earn; 0: as far as it likes"""

    def __call__(self, output: TokenOutput, batch: PackedBatch) -> LossOutput:
        """
        Args:
            output: each token's score, of this rank's share.
            batch: with columns, 0 where there is no state: ``returns_T``; ``old_values_T``, values by the weights before the
                step's updates; ``state_weight_T``, the state's part in the sum that is divided by the count; ``counted_S``, what
                each segment adds to the count.
        """
        weight_T = batch.column("state_weight_T").double()
        returns_T, old_T = batch.column("returns_T").double(), batch.column("old_values_T").double()
        values_T = output.values_T.double()
        loss_T, clipped_T = (values_T - returns_T).square(), weight_T.new_zeros(len(weight_T)).bool()
        if self.clip:
            bounded_T = values_T.clamp(old_T - self.clip, old_T + self.clip)
            other_T = (bounded_T - returns_T).square()
            clipped_T = other_T > loss_T
            loss_T = loss_T.maximum(other_T)
        states_T = weight_T > 0
        counted = batch.column("counted_S").sum() if batch.context_rank == 0 else 0
        loss = self.coefficient / 2 * (loss_T * weight_T).sum()
        return LossOutput(loss, counted, {"value_clipped": ((clipped_T & states_T).sum(), states_T.sum())})
