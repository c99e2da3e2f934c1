"""Preference and reward objectives against their formulae, written out pair by pair and differentiated in float64."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

from tulu_mega.data.batch import pack
from tulu_mega.layout.alignment import Alignment
from tulu_mega.objectives.preference import PreferenceObjective
from tulu_mega.objectives.reward import RewardObjective
from tulu_mega.records import IGNORE, TokenizedRow

LENGTHS = [(7, 3), (4, 12), (9, 9)]
BETA = {"dpo": 0.1, "dpo_norm": 5.0, "ipo": 0.3, "simpo": 2.0}


def batch(pairs=LENGTHS, total=64):
    """Pairs with two tokens of prompt, padded to a total."""
    lengths = [length for pair in pairs for length in pair]
    rows = [TokenizedRow(row, list(range(2 + n)), [IGNORE, IGNORE, *range(2, 2 + n)]) for row, n in enumerate(lengths)]
    packed = pack(rows, Alignment(total=total))
    generator = torch.Generator().manual_seed(1)
    segments = len(packed.rows_S)
    return dataclasses.replace(
        packed,
        ref_logp_S=-torch.rand(segments, generator=generator, dtype=torch.float64) * 20,
        margin_S=torch.rand(segments, generator=generator, dtype=torch.float64),
    )


def log_sigmoid(x):
    return -math.log1p(math.exp(-x))


def written_out(loss, chosen, rejected, beta, smoothing, ratio, sft):
    """One pair's loss; a side is its (sum, tokens, reference's sum)."""
    (lc, nc, rc), (lr, nr, rr) = chosen, rejected
    if loss == "dpo":
        d = (lc - rc) - (lr - rr)
    elif loss == "simpo":
        d = lc / nc - lr / nr
    else:
        d = (lc / nc - rc / nc) - (lr / nr - rr / nr)
    if loss == "ipo":
        value = (d - 1 / (2 * beta)) ** 2
    else:
        z = beta * d - (beta * ratio if loss == "simpo" else 0.0)
        value = -(1 - smoothing) * log_sigmoid(z) - smoothing * log_sigmoid(-z)
    return value - sft * lc / nc


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("sft", [0.0, 0.7])
@pytest.mark.parametrize("loss", list(BETA))
def test_loss_and_gradient_are_the_formula_s(loss, smoothing, sft):
    smoothing = 0.0 if loss == "ipo" else smoothing
    packed = batch()
    logp = -torch.rand(len(packed.rows_S), generator=torch.Generator().manual_seed(2), dtype=torch.float64) * 20
    logp.requires_grad_()
    out = PreferenceObjective(loss, BETA[loss], smoothing, 0.3, sft)(logp, packed)
    out.loss_sum.backward()

    def total(values):
        sides = [(values[s], int(packed.trained_S[s]), float(packed.ref_logp_S[s])) for s in range(2 * len(LENGTHS))]
        pairs = zip(sides[::2], sides[1::2], strict=True)
        return sum(written_out(loss, chosen, rejected, BETA[loss], smoothing, 0.3, sft) for chosen, rejected in pairs)

    values = logp.detach().tolist()
    assert float(out.loss_sum) == pytest.approx(total(values), rel=1e-12)
    assert out.count == len(LENGTHS)
    for at in range(len(values)):
        step = 1e-5
        up, down = list(values), list(values)
        up[at] += step
        down[at] -= step
        slope = (total(up) - total(down)) / (2 * step) if at < 2 * len(LENGTHS) else 0.0
        assert float(logp.grad[at]) == pytest.approx(slope, rel=1e-6, abs=1e-9)


def test_metrics():
    packed = batch()
    logp = packed.ref_logp_S.clone()
    logp[0] += 14.0  # the first pair's chosen response, 7 tokens
    logp[3] += 6.0  # the second's rejected one, 12 tokens
    metrics = {k: float(v) / n for k, (v, n) in PreferenceObjective("dpo_norm", 5.0)(logp, packed).metrics.items()}
    assert metrics["accuracy"] == pytest.approx(1 / 3)
    assert metrics["margin"] == pytest.approx(5 * (2.0 - 0.5) / 3)
    assert metrics["chosen_reward"] == pytest.approx(5 * 2.0 / 3)
    assert metrics["rejected_reward"] == pytest.approx(5 * 0.5 / 3)
    assert metrics["chosen_logp"] == pytest.approx(float(logp[[0, 2, 4]].mean()))
    assert metrics["kl"] == pytest.approx(-(2.0 + 0.5) / 6)


@pytest.mark.parametrize("loss", ["dpo", "dpo_norm", "ipo"])
def test_a_policy_that_is_the_reference(loss):
    packed = batch()
    objective = PreferenceObjective(loss, BETA[loss], 0.0 if loss == "ipo" else 0.1)
    out = objective(packed.ref_logp_S, packed)
    assert float(out.loss_sum) / out.count == pytest.approx(objective.at_reference(), rel=1e-12)
    assert float(out.metrics["margin"][0]) == 0
    if loss != "ipo":
        assert objective.at_reference() == math.log(2)


def test_a_pack_of_padding_counts_nothing():
    packed = batch([])
    logp = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    for objective in (PreferenceObjective("dpo_norm", 5.0), RewardObjective()):
        out = objective(logp, packed)
        out.loss_sum.backward()
        assert (float(out.loss_sum), out.count, float(logp.grad)) == (0.0, 0, 0.0)


@pytest.mark.parametrize("margin", [False, True])
def test_reward_pairs(margin):
    packed = batch()
    if not margin:
        packed = dataclasses.replace(packed, margin_S=None)
    score = torch.randn(len(packed.rows_S), generator=torch.Generator().manual_seed(3), dtype=torch.float64, requires_grad=True)
    out = RewardObjective()(score, packed)
    out.loss_sum.backward()
    values, asked = score.detach().numpy(), packed.margin_S.numpy() if margin else np.zeros(len(score))
    z = values[0:6:2] - values[1:6:2] - asked[0:6:2]
    assert float(out.loss_sum) == pytest.approx(float(np.log1p(np.exp(-z)).sum()), rel=1e-12)
    slope = -1 / (1 + np.exp(z))
    np.testing.assert_allclose(score.grad.numpy(), [*np.stack([slope, -slope], 1).ravel(), 0.0], rtol=1e-12)
    assert float(out.metrics["accuracy"][0]) == int((values[0:6:2] > values[1:6:2]).sum())
