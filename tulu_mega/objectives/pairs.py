"""What objectives of pairs share. Loads without torch: settings read the losses' names and defaults."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from tulu_mega.records import PackedBatch


@dataclass(frozen=True)
class Side:
    """The chosen or the rejected responses of a pack's pairs: float64 [P] each, differentiable."""

    gain_P: Tensor
    """``l - l_ref``, or ``l`` of a loss that reads no reference; l is a response's log-probability as the loss wants it, see
    `PreferenceLoss.of_means`"""
    mean_P: Tensor
    """mean log-probability per response token"""


class PreferenceLoss(Protocol):
    """The loss of a pair; in `objectives/preference/`, a frozen dataclass named ``Loss`` with defaults for its settings."""

    of_means: ClassVar[bool]
    """whether l is the mean of the response tokens' log-probabilities; otherwise it is their sum"""
    reads_reference: ClassVar[bool]
    """whether gains are measured from a reference model"""
    beta: float
    """what makes a reward of a gain, in the metrics too"""

    def __call__(self, chosen: Side, rejected: Side) -> Tensor:
        """The loss of each pair, float64 [P]."""


class ReferenceLoss(PreferenceLoss, Protocol):
    """A loss that reads a reference, which the policy is before the first step."""

    def at_reference(self) -> float:
        """The loss of any pair while the policy is the reference."""

    def tolerance(self, difference: float) -> float:
        """How far the loss may be from `at_reference` while the pair's two gains are together off 0 by `difference` or less."""


def sides(batch: PackedBatch, *values_S: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Chosen and rejected, [P] each, of every value; P pairs are in the pack, none where it is padding only."""
    real = len(batch.rows_S) // 2 * 2  # padding is one segment, the last: known without asking a GPU
    return [value_S[:real].view(-1, 2).unbind(1) for value_S in values_S]


def logistic_loss(logits_P: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """``-(1 - e) log sigmoid(z) - e log sigmoid(-z)``, [P]: e is the share of the labels taken to be the wrong way round."""
    import torch.nn.functional as F

    return -(1 - label_smoothing) * F.logsigmoid(logits_P) - label_smoothing * F.logsigmoid(-logits_P)
