"""PPO's arithmetic against one of another kind: padded float64 tensors and masks (`tests/lib/oracles/ppo.py`), and autograd."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.lib.oracles import ppo as oracle
from tulu_mega.config.ppo import PpoPolicySettings
from tulu_mega.data.batch import pack_prefix_groups
from tulu_mega.data.prefix_sharing import PrefixGroup
from tulu_mega.layout.alignment import Alignment
from tulu_mega.objectives.gae import Discounts, estimate, generalised_advantages, whitening
from tulu_mega.objectives.policy import PolicyObjective
from tulu_mega.objectives.value import ValueObjective
from tulu_mega.records import IGNORE, PackedBatch, TokenizedRow, TokenOutput
from tulu_mega.rl.states import estimates, figures, with_estimates

ROOM, BETA, LAM, CLIP, RANGE = 6, 0.07, 0.95, 0.2, 0.2
LENGTHS = {"ended": [4, 2, 5], "cut off": [6, 6], "one token": [1, 1, 1], "mixed": [1, 6, 3, 5, 2, 6]}


class Drawn:
    """Responses of some lengths, of which those of ROOM tokens filled it, and what models say of them: [B, ROOM + 1] each."""

    def __init__(self, lengths: list[int]):
        made = torch.Generator().manual_seed(sum(lengths))
        shape = (len(lengths), ROOM + 1)
        self.lengths = torch.tensor(lengths)
        self.old_logp, self.ref_logp, self.logp = (-torch.rand(shape, generator=made, dtype=torch.float64) for _ in range(3))
        self.old_values, self.values = (torch.randn(shape, generator=made, dtype=torch.float64) for _ in range(2))
        self.score = torch.randint(0, 2, (len(lengths),), generator=made) * 10.0 - 3
        self.logp.requires_grad_(), self.values.requires_grad_()


def padded(drawn: Drawn) -> dict[str, Tensor]:
    """The oracle: everything [B, ROOM], the value of state t in column t."""
    masks = oracle.Masks(drawn.lengths, drawn.lengths == ROOM, ROOM)
    logp, old_logp, ref_logp, now, values = (
        each[:, :ROOM] for each in (drawn.logp, drawn.old_logp, drawn.ref_logp, drawn.values, drawn.old_values)
    )
    white, returns = oracle.advantages_and_returns(masks, drawn.score.double(), old_logp, ref_logp, values, BETA, LAM)
    return {
        "advantages": white,
        "returns": returns,
        "of_policy": masks.of_policy,
        "of_value": masks.of_value,
        "value_loss": oracle.value_loss(masks, now, values, returns, RANGE, 0.1),
        "policy_loss": oracle.policy_loss(masks, logp, old_logp, white, CLIP),
    }


def packs_of(drawn: Drawn, shared: int = 0) -> tuple[list[PackedBatch], frozenset[int]]:
    """The same responses in two packs, prompts of three tokens before them."""
    rows = []
    for number, length in enumerate(drawn.lengths.tolist()):
        answer = list(range(10, 10 + length))
        rows.append(TokenizedRow(number, [1, 2, 3, *answer], [IGNORE] * 3 + answer))
    half = len(rows) // 2
    parts = [rows[half:], rows[:half]]
    groups = [[PrefixGroup(tuple(part), 2, True)] if shared else [PrefixGroup((row,), 0, True) for row in part] for part in parts]
    cut_off = frozenset(number for number, length in enumerate(drawn.lengths.tolist()) if length == ROOM)
    return [pack_prefix_groups(each, Alignment(1, 16)) for each in groups], cut_off


def laid(batch: PackedBatch, values: Tensor) -> Tensor:
    """[B, ROOM + 1] by state at the pack's positions: the prompt's last token is before the first action."""
    out_T = torch.zeros(len(batch.tokens_T), dtype=values.dtype)
    for segment, number in enumerate(batch.rows_S.tolist()):
        if number >= 0:
            at = ((batch.segments_T == segment) & (batch.loss_mask_T | batch.ends_T)).nonzero().squeeze(1)
            out_T = out_T.index_put((at,), values[number, : len(at)])
    return out_T


def prepared(drawn: Drawn, batches: list[PackedBatch], cut_off: frozenset[int], discounts: Discounts):
    columns = {"old_logp_T": drawn.old_logp, "ref_logp_T": drawn.ref_logp, "old_values_T": drawn.old_values}
    batches = [batch.with_columns(**{name: laid(batch, value) for name, value in columns.items()}) for batch in batches]
    found = estimates(batches, dict(enumerate(drawn.score.tolist())), cut_off, BETA, discounts)
    whiten = whitening([found[number][0].advantages for number in sorted(found)])
    return [with_estimates(batch, found, whiten, cut_off, "sequence", ROOM) for batch in batches], found, whiten


@pytest.mark.parametrize("shared", [0, 2], ids=["each with its prompt", "prompts shared"])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
def test_estimates_losses_and_gradients_are_those_of_padded_tensors(lengths, shared):
    drawn = Drawn(lengths)
    expected = padded(drawn)
    batches, cut_off = packs_of(drawn, shared)
    batches, found, whiten = prepared(drawn, batches, cut_off, Discounts(1.0, LAM))
    for number, (each, _) in found.items():
        of_policy, of_value = expected["of_policy"][number], expected["of_value"][number]
        np.testing.assert_allclose(whiten(each.advantages), expected["advantages"][number][of_policy], rtol=0, atol=1e-10)
        np.testing.assert_allclose(each.returns, expected["returns"][number][of_value], rtol=0, atol=1e-10)

    settings = PpoPolicySettings(clip_low=CLIP, clip_high=CLIP, importance="none")
    value, policy = ValueObjective(0.1, RANGE), PolicyObjective.without_divergence(settings, ROOM)
    sums = {"value": [], "policy": []}
    counts = {"value": 0, "policy": 0}
    for batch in batches:
        # the packs' columns are float32, as models give them: here they are taken as they are in the oracle
        exact = batch.with_columns(
            returns_T=_by_state(batch, {n: e.returns for n, (e, _) in found.items()}, cut_off),
            advantages_T=_by_state(batch, {n: whiten(e.advantages) for n, (e, _) in found.items()}, cut_off),
            state_weight_T=_by_state(
                batch, {n: np.full(len(e.returns), 1 / len(e.returns)) for n, (e, _) in found.items()}, cut_off
            ),
            sampler_logp_T=batch.column("old_logp_T"),
        )
        torch.testing.assert_close(exact.column("state_weight_T").float(), batch.column("state_weight_T"))
        values = value(TokenOutput(laid(batch, drawn.values), None, exact), exact)
        logp_T = laid(batch, drawn.logp) * batch.loss_mask_T
        policies = policy(TokenOutput(logp_T, torch.zeros_like(logp_T), exact), exact)
        for name, out in {"value": values, "policy": policies}.items():
            sums[name].append(out.loss_sum)
            counts[name] += int(out.count)
    for name, wanted in {"value": drawn.values, "policy": drawn.logp}.items():
        loss = sum(sums[name]) / counts[name]
        assert counts[name] == len(lengths)
        torch.testing.assert_close(loss, expected[f"{name}_loss"], rtol=0, atol=1e-10)
        (gradient,) = torch.autograd.grad(loss, wanted, retain_graph=True)
        (wanted_too,) = torch.autograd.grad(expected[f"{name}_loss"], wanted, retain_graph=True)
        torch.testing.assert_close(gradient, wanted_too, rtol=0, atol=1e-10)


def _by_state(batch: PackedBatch, given: dict[int, np.ndarray], cut_off: frozenset[int]) -> Tensor:
    rows = torch.zeros(max(given) + 1, ROOM + 1, dtype=torch.float64)
    for number, values in given.items():
        rows[number, : len(values)] = torch.from_numpy(np.asarray(values))
    return laid(batch, rows)


def test_columns_are_laid_where_states_and_actions_are():
    drawn = Drawn([2, ROOM])
    batches, cut_off = packs_of(drawn)
    batches, found, whiten = prepared(drawn, batches, cut_off, Discounts(1.0, LAM))
    for batch in batches:
        for segment, number in enumerate(batch.rows_S.tolist()):
            if number < 0:
                continue
            first = int(batch.cu_seqlens_S1[segment]) + 2  # the prompt's last token
            n, states = drawn.lengths[number], 3 if number == 0 else ROOM
            np.testing.assert_allclose(batch.column("returns_T")[first : first + states], found[number][0].returns, rtol=1e-6)
            advantages = whiten(found[number][0].advantages)
            np.testing.assert_allclose(batch.column("advantages_T")[first : first + n], advantages, rtol=1e-6)
        states = sum(3 if number == 0 else ROOM for number in batch.rows_S if number >= 0)
        assert (batch.column("state_weight_T") > 0).sum() == states
        assert batch.column("counted_S").tolist() == [int(number >= 0) for number in batch.rows_S]


def test_tokens_that_were_given_are_no_actions():
    """Two answers with a tool's output between: states are before each action, and behind the last."""
    row = TokenizedRow(0, [1, 2, 10, 11, 5, 6, 12, 13], [IGNORE, IGNORE, 10, 11, IGNORE, IGNORE, 12, 13])
    batch = pack_prefix_groups([PrefixGroup((row,), 0, True)], Alignment(1, 1))
    values_T, logp_T = torch.arange(8.0), torch.zeros(8)
    batch = batch.with_columns(old_logp_T=logp_T, old_values_T=values_T)
    found = estimates([batch], {0: 1.0}, frozenset(), 0.0, Discounts(1.0, 0.9))
    _, values = found[0]
    assert values.tolist() == [1, 2, 5, 6, 7]
    np.testing.assert_allclose(
        found[0][0].advantages, generalised_advantages(np.array([0, 0, 0, 0, 1.0]), values, 1.0, 0.9)[:4], atol=1e-12
    )


def test_lambda_1_gives_whole_returns_and_0_the_value_models_word():
    logp, values = [-1.0, -2.0, -0.5], [0.3, -0.2, 0.4, 0.9]
    whole = estimate(2.0, logp, None, values, 0.0, Discounts(1.0, 1.0))
    np.testing.assert_allclose(whole.returns, [2.0] * 4, atol=1e-12)
    word = estimate(2.0, logp, None, values, 0.0, Discounts(1.0, 0.0))
    np.testing.assert_allclose(word.advantages, [-0.5, 0.6, 0.5], atol=1e-12)


def test_vapos_lambdas_are_of_the_policy_by_length_and_of_the_value_model():
    logp, values = [-1.0] * 40, list(np.linspace(-1, 1, 41))
    both = estimate(1.0, logp, None, values, 0.0, Discounts(1.0, 0.95, value_lam=1.0, adaptive=0.05))
    policy = estimate(1.0, logp, None, values, 0.0, Discounts(1.0, 1 - 1 / (0.05 * 40)))
    value = estimate(1.0, logp, None, values, 0.0, Discounts(1.0, 1.0))
    np.testing.assert_allclose(both.advantages, policy.advantages, atol=1e-12)
    np.testing.assert_allclose(both.returns, value.returns, atol=1e-12)
    assert Discounts(adaptive=0.05).of_policy(10) == 0.0  # a short response's would be below 0


def test_one_action_in_all_is_whitened_to_0():
    assert whitening([np.array([3.0])])(np.array([3.0])).tolist() == [0.0]


def test_explained_variance():
    logp = [-1.0, -1.0]
    perfect = [estimate(score, logp, None, [score, score, score], 0.0, Discounts(1.0, 1.0)) for score in (1.0, 3.0)]
    values = [np.full(3, 1.0), np.full(3, 3.0)]
    told = figures(list(zip(perfect, values, strict=True)), whitening([each.advantages for each in perfect]))
    assert told["explained_variance"] == 1.0 and told["returns"] == 2.0
    flat = [np.zeros(3), np.zeros(3)]
    assert figures(list(zip(perfect, flat, strict=True)), whitening([np.zeros(2)]))["explained_variance"] == 0.0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (dict(gamma=1.5), "gamma = 1.5: expected a factor from 0 to 1"),
        (dict(value_lam=-0.1), "value_lam = -0.1"),
        (dict(adaptive=0.0), "adaptive = 0: expected a factor above 0"),
    ],
)
def test_factors_that_cannot_be_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        Discounts(**given)


def test_other_lengths_are_refused():
    with pytest.raises(ValueError, match="2 log-probabilities, 1 of the reference's and 5 values"):
        estimate(1.0, [-1.0, -1.0], [-1.0], [0.0] * 5, 0.1, Discounts())
    row = TokenizedRow(0, [1, 2, 10], [IGNORE, IGNORE, 10])
    with pytest.raises(ValueError, match="no last token in its pack"):
        batch = pack_prefix_groups([PrefixGroup((row,), 0)], Alignment(1, 1))
        batch = batch.with_columns(old_logp_T=torch.zeros(2), old_values_T=torch.zeros(2))
        estimates([batch], {0: 1.0}, frozenset(), 0.0, Discounts())
