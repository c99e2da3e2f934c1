"""Supervised fine-tuning: cross-entropy over the supervised tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from tulu_mega.config.sections import Reduction
from tulu_mega.records import LossOutput, PackedBatch, Reads, TokenOutput


@dataclass(frozen=True)
class SftObjective:
    """Sum of ``-log p(label)`` over supervised tokens, divided once over the global batch.

    ``reduction = "sum"`` divides by the number of sequences (Tulu 3, arXiv 2411.15124, section 4.3.2: the sum loss that
    keeps long conversations from being down-weighted); ``"token_mean"`` by the number of supervised tokens.
    """

    reduction: Reduction
    reads: ClassVar[Reads] = Reads.TOKENS
    reported: ClassVar[tuple[str, ...]] = ("nll",)
    largest: ClassVar[tuple[str, ...]] = ()

    def __call__(self, output: TokenOutput, batch: PackedBatch) -> LossOutput:
        """
        Args:
            output: log-probabilities of ``batch.labels_T``.
            batch: the micro-batch.
        """
        nll = -(output.values_T * batch.loss_mask_T).sum()
        tokens = len(batch.labelled_N)  # known on the host: nobody waits for a GPU
        count = batch.num_sequences if self.reduction == "sum" else tokens
        return LossOutput(nll, count, {"nll": (nll.detach(), tokens)})


@dataclass(frozen=True)
class HeldOutLikelihood:
    """Mean of ``-log p(label)`` over supervised tokens, in nats: what rows are evaluated by that are not trained on.

    A run's ``reduction`` does not change it, so that runs can be compared.
    """

    reads: ClassVar[Reads] = Reads.TOKENS
    reported: ClassVar[tuple[str, ...]] = ()
    largest: ClassVar[tuple[str, ...]] = ()

    def __call__(self, output: TokenOutput, batch: PackedBatch) -> LossOutput:
        """
        Args:
            output: log-probabilities of ``batch.labels_T``, 0 where there is no label.
            batch: the micro-batch.
        """
        # float64: a float32 sum would round by how the rows are packed
        return LossOutput(-output.values_T.sum(dtype=torch.float64), len(batch.labelled_N))
