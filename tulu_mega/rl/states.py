"""The states and actions of responses in their packs, by token: the data of a value model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from tulu_kernels.policy_choices import Aggregation

from tulu_mega.objectives.gae import Discounts, TokenEstimates, Whitening, estimate
from tulu_mega.records import PackedBatch


@dataclass(frozen=True)
class Trace:
    """Where a response's actions and states lie in its pack."""

    number: int
    """number of the response"""
    segment: int
    actions: Tensor
    """int64 [n], the positions that predict its trained tokens"""
    states: Tensor
    """int64 [n + 1], the actions' positions and that of the last trained token; [n] where the response was cut off"""


def traces(batch: PackedBatch, cut_off: Set[int]) -> list[Trace]:
    """The responses of a whole pack, which holds their last tokens.

    Args:
        cut_off: numbers of the responses whose room ran out.

    Raises:
        ValueError: the pack leaves last tokens out.
    """
    found = []
    for segment, number in enumerate(batch.rows_S.tolist()):
        if number < 0:
            continue
        first, last = int(batch.cu_seqlens_S1[segment]), int(batch.cu_seqlens_S1[segment + 1])
        actions = batch.loss_mask_T[first:last].nonzero().squeeze(1) + first
        end = batch.ends_T[first:last].nonzero().squeeze(1) + first
        if len(end) != 1:
            raise ValueError(f"response {number} has no last token in its pack; pack with ends=True")
        found.append(Trace(number, segment, actions, actions if number in cut_off else torch.cat([actions, end])))
    return found


def values_of(batches: Iterable[PackedBatch], cut_off: Set[int]) -> dict[int, np.ndarray]:
    """The values of each response's states, float32, by its number.

    Args:
        batches: whole packs with the column ``old_values_T``.
        cut_off: as for :func:`traces`.
    """
    return {
        trace.number: batch.column("old_values_T")[trace.states].numpy() for batch in batches for trace in traces(batch, cut_off)
    }


def with_values(batch: PackedBatch, values: Mapping[int, np.ndarray], cut_off: Set[int]) -> PackedBatch:
    """Return the pack with the column ``old_values_T``, filled by response: the value model may have read other packs.

    Args:
        values: of :func:`values_of`, for each of the pack's responses.
    """
    values_T = torch.zeros(len(batch.tokens_T))
    for trace in traces(batch, cut_off):
        values_T[trace.states] = torch.from_numpy(values[trace.number])
    return batch.with_columns(old_values_T=values_T)


def estimates(
    batches: Iterable[PackedBatch], scores: Mapping[int, float], cut_off: Set[int], beta: float, discounts: Discounts
) -> dict[int, tuple[TokenEstimates, np.ndarray]]:
    """Each response's advantages and returns, and the values of its states, by its number.

    Args:
        batches: whole packs with the columns ``old_logp_T``, ``old_values_T`` and, where `beta` is not 0, ``ref_logp_T``.
        scores: reward of each response, by its number.
        cut_off: as for :func:`traces`.
        beta, discounts: as for :func:`tulu_mega.objectives.gae.estimate`.
    """
    found = {}
    for batch in batches:
        logp_T, values_T = (batch.column(name).double().numpy() for name in ("old_logp_T", "old_values_T"))
        ref_T = batch.column("ref_logp_T").double().numpy() if beta else None
        for trace in traces(batch, cut_off):
            actions, values = trace.actions.numpy(), values_T[trace.states.numpy()]
            ref = None if ref_T is None else ref_T[actions]
            found[trace.number] = estimate(scores[trace.number], logp_T[actions], ref, values, beta, discounts), values
    return found


def with_estimates(
    batch: PackedBatch,
    found: Mapping[int, tuple[TokenEstimates, np.ndarray]],
    whitening: Whitening,
    cut_off: Set[int],
    aggregation: Aggregation,
    max_tokens: int,
) -> PackedBatch:
    """The pack with whitened advantages for the policy, and for the value model returns and each state's part in its loss.

    Args:
        found: of :func:`estimates`, for each of the pack's responses.
        aggregation: what a loss is the mean of, as in `policy.aggregation`, states for tokens.
        max_tokens: longest response, for the aggregation by a constant.
    """
    columns = {name: torch.zeros(len(batch.tokens_T)) for name in ("advantages_T", "returns_T", "state_weight_T")}
    counted_S = torch.zeros(len(batch.rows_S), dtype=torch.int64)
    for trace in traces(batch, cut_off):
        estimates, _ = found[trace.number]
        states = len(trace.states)
        weights: dict[Aggregation, tuple[float, int]] = {
            "token": (1.0, states),
            "sequence": (1 / states, 1),
            "constant": (1 / max_tokens, 1),
        }
        weight, counted_S[trace.segment] = weights[aggregation]
        columns["advantages_T"][trace.actions] = torch.from_numpy(whitening(estimates.advantages)).float()
        columns["returns_T"][trace.states] = torch.from_numpy(estimates.returns).float()
        columns["state_weight_T"][trace.states] = weight
    return batch.with_columns(**columns, counted_S=counted_S)


def figures(found: Sequence[tuple[TokenEstimates, np.ndarray]], whitening: Whitening) -> dict[str, float]:
    """Metrics of a step's estimates, over all its responses; the same whatever their order, but for rounding.

    ``explained_variance`` is ``1 - Var(returns - values) / Var(returns)`` over states: 1 of perfect values, 0 of a constant.
    """
    advantages, returns, values = (
        np.concatenate(parts)
        for parts in (
            [each.advantages for each, _ in found],
            [each.returns for each, _ in found],
            [values for _, values in found],
        )
    )
    spread = float(returns.var())
    return {
        "returns": float(returns.mean()),
        "values": float(values.mean()),
        "explained_variance": 1 - float((returns - values).var()) / spread if spread > 0 else 0.0,
        "advantage": whitening.mean,
        "advantage_deviation": float(advantages.std()),
        "kl_reward": float(np.mean([each.penalty for each, _ in found])),
    }
