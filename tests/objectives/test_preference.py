"""Preference and reward objectives against their formulae, written out pair by pair and differentiated in float64."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.lib.oracles.pair_losses import Scored, pair_loss
from tulu_mega.config.preference import PREFERENCE_LOSSES, PreferenceSettings
from tulu_mega.data.batch import pack
from tulu_mega.layout.alignment import Alignment
from tulu_mega.objectives.pairs import Side
from tulu_mega.objectives.preference_objective import PreferenceObjective
from tulu_mega.objectives.reward import RewardObjective
from tulu_mega.records import IGNORE, TokenizedRow

LENGTHS = [(7, 3), (4, 12), (9, 9)]


def fields_of(loss) -> set[str]:
    return {field.name for field in dataclasses.fields(PREFERENCE_LOSSES[loss])}


def batch(pairs=LENGTHS, total=64):
    """Pairs with two tokens of prompt, padded to a total."""
    lengths = [length for pair in pairs for length in pair]
    rows = [TokenizedRow(row, list(range(2 + n)), [IGNORE, IGNORE, *range(2, 2 + n)]) for row, n in enumerate(lengths)]
    packed = pack(rows, Alignment(total=total))
    generator = torch.Generator().manual_seed(1)
    segments = len(packed.rows_S)
    return packed.with_columns(
        ref_logp_S=-torch.rand(segments, generator=generator, dtype=torch.float64) * 20,
        margin_S=torch.rand(segments, generator=generator, dtype=torch.float64),
    )


def objective(loss="dpo_norm", **settings) -> PreferenceObjective:
    return PreferenceObjective.of(PreferenceSettings(loss=loss, **settings))


def logp_of(packed, seed=2):
    drawn = torch.rand(len(packed.rows_S), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (-20 * drawn).requires_grad_()


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("sft", [0.0, 0.7])
@pytest.mark.parametrize("loss", list(PREFERENCE_LOSSES))
def test_loss_and_gradient_are_the_formula_s(loss, smoothing, sft):
    smoothing = smoothing if "label_smoothing" in fields_of(loss) else 0.0
    packed, settings = batch(), PreferenceSettings(loss=loss, label_smoothing=smoothing, sft_weight=sft)
    logp, same = logp_of(packed), logp_of(packed)
    out = PreferenceObjective.of(settings)(logp, packed)
    out.loss_sum.backward()

    ref = packed.column("ref_logp_S")
    sides = [Scored(same[s], int(packed.trained_S[s]), float(ref[s])) for s in range(2 * len(LENGTHS))]
    total = sum(pair_loss(settings, chosen, rejected) for chosen, rejected in zip(sides[::2], sides[1::2], strict=True))
    total.backward()
    torch.testing.assert_close(out.loss_sum, total, rtol=1e-12, atol=0)
    torch.testing.assert_close(logp.grad, same.grad, rtol=1e-11, atol=1e-15)
    assert out.count == len(LENGTHS)


@pytest.mark.parametrize("loss", list(PREFERENCE_LOSSES))
def test_what_a_loss_says_of_itself(loss):
    kind = PREFERENCE_LOSSES[loss]
    assert fields_of(loss) <= PreferenceSettings.model_fields.keys() - {"loss", "sft_weight"}  # each has to be a setting
    assert objective(loss).loss == kind() and objective(loss, beta=0.7).loss == kind(beta=0.7)
    packed = batch()
    bare = dataclasses.replace(packed, columns={})
    if kind.reads_reference:
        with pytest.raises(LookupError, match="no column 'ref_logp_S'"):
            objective(loss)(logp_of(packed), bare)
    else:
        assert objective(loss)(logp_of(packed), bare).loss_sum.equal(objective(loss)(logp_of(packed), packed).loss_sum)
        assert not hasattr(kind, "at_reference")


@given(
    loss=st.sampled_from([name for name, kind in PREFERENCE_LOSSES.items() if kind.reads_reference]),
    beta=st.floats(0.01, 10),
    smoothing=st.sampled_from([0.0, 0.3]),
    chosen=st.floats(-2, 2),
    rejected=st.floats(-2, 2),
)
def test_rounding_takes_the_first_loss_no_farther_than_it_says(loss, beta, smoothing, chosen, rejected):
    settings = {"beta": beta} | ({"label_smoothing": smoothing} if "label_smoothing" in fields_of(loss) else {})
    made = PREFERENCE_LOSSES[loss](**settings)
    gains = [torch.tensor([gain], dtype=torch.float64) for gain in (chosen, rejected)]
    value = float(made(*(Side(gain, gain) for gain in gains)))
    most = made.tolerance(abs(chosen) + abs(rejected))
    assert abs(value - made.at_reference()) <= most * (1 + 1e-9) + 1e-12 * max(1.0, made.at_reference())


def test_orpo_is_the_likelihood_of_the_chosen_response_and_the_ratio_of_odds():
    packed = batch()
    logp = logp_of(packed).detach()
    once, twice = (float(objective("orpo", beta=beta)(logp, packed).loss_sum) for beta in (1.0, 2.0))
    means = (logp / packed.trained_S)[: 2 * len(LENGTHS)].view(-1, 2)
    assert 2 * once - twice == pytest.approx(-float(means[:, 0].sum()), rel=1e-12)
    odds = means.exp() / (1 - means.exp())
    assert twice - once == pytest.approx(float(torch.log1p(odds[:, 1] / odds[:, 0]).sum()), rel=1e-12)


def test_orpo_of_a_response_that_is_certain():
    packed = batch()
    logp = logp_of(packed).detach()
    logp[0] = logp[3] = 0.0  # a chosen and a rejected one
    out = objective("orpo")(logp.requires_grad_(), packed)
    out.loss_sum.backward()
    assert out.loss_sum.isfinite() and logp.grad.isfinite().all() and logp.grad[0] < 0


def test_metrics():
    packed = batch()
    logp = packed.column("ref_logp_S").clone()
    logp[0] += 14.0  # the first pair's chosen response, 7 tokens
    logp[3] += 6.0  # the second's rejected one, 12 tokens
    metrics = {k: float(v) / n for k, (v, n) in objective()(logp, packed).metrics.items()}
    assert metrics["accuracy"] == pytest.approx(1 / 3)
    assert metrics["margin"] == pytest.approx(5 * (2.0 - 0.5) / 3)
    assert metrics["chosen_reward"] == pytest.approx(5 * 2.0 / 3)
    assert metrics["rejected_reward"] == pytest.approx(5 * 0.5 / 3)
    assert metrics["chosen_logp"] == pytest.approx(float(logp[[0, 2, 4]].mean()))
    assert metrics["kl"] == pytest.approx(-(2.0 + 0.5) / 6)


@pytest.mark.parametrize("loss", [name for name, kind in PREFERENCE_LOSSES.items() if kind.reads_reference])
def test_a_policy_that_is_the_reference(loss):
    packed = batch()
    made = objective(loss)
    out = made(packed.column("ref_logp_S"), packed)
    assert float(out.loss_sum) / out.count == pytest.approx(made.loss.at_reference(), rel=1e-12)
    assert float(out.metrics["margin"][0]) == 0
    if loss in ("dpo", "dpo_norm"):
        assert made.loss.at_reference() == math.log(2)


def test_a_pack_of_padding_counts_nothing():
    packed = batch([])
    logp = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    for each in (*map(objective, PREFERENCE_LOSSES), RewardObjective()):
        out = each(logp, packed)
        out.loss_sum.backward()
        assert (float(out.loss_sum), out.count, float(logp.grad)) == (0.0, 0, 0.0)


@pytest.mark.parametrize("margin", [False, True])
def test_reward_pairs(margin):
    packed = batch()
    if not margin:
        packed = dataclasses.replace(packed, columns={})
    score = torch.randn(len(packed.rows_S), generator=torch.Generator().manual_seed(3), dtype=torch.float64, requires_grad=True)
    out = RewardObjective()(score, packed)
    out.loss_sum.backward()
    values, asked = score.detach().numpy(), packed.column("margin_S").numpy() if margin else np.zeros(len(score))
    z = values[0:6:2] - values[1:6:2] - asked[0:6:2]
    assert float(out.loss_sum) == pytest.approx(float(np.log1p(np.exp(-z)).sum()), rel=1e-12)
    slope = -1 / (1 + np.exp(z))
    np.testing.assert_allclose(score.grad.numpy(), [*np.stack([slope, -slope], 1).ravel(), 0.0], rtol=1e-12)
    assert float(out.metrics["accuracy"][0]) == int((values[0:6:2] > values[1:6:2]).sum())
