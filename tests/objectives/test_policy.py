"""What policy objectives promise beyond their formulae, which tests/objectives/test_policy_ranks.py holds against autograd."""

from __future__ import annotations

import math

import pytest
import torch
from tulu_kernels.policy_loss.reference import divergence, importance_weights

from tulu_mega.config.rollout import PolicySettings
from tulu_mega.data.batch import by_token, pack
from tulu_mega.layout.alignment import Alignment
from tulu_mega.objectives.policy import PolicyObjective
from tulu_mega.records import IGNORE, PackedBatch, TokenizedRow, TokenOutput
from tulu_mega.rl.reporter import over_updates
from tulu_mega.train.batch_loss import BatchLoss

LENGTHS = [7, 3, 12, 1]
MAX_TOKENS = 16


def batch(rows=(0, 1, 2, 3), untrained=(), **columns) -> PackedBatch:
    """Responses behind two tokens of prompt, padded to a total; what each token is given follows from row and place."""
    made = []
    for row in rows:
        ids = [row + 1] * (2 + LENGTHS[row])
        made.append(TokenizedRow(row, ids, [IGNORE] * len(ids) if row in untrained else [IGNORE, IGNORE, *ids[2:]]))
    packed = pack(made, Alignment(total=32))

    def drawn(seed: int, scale: float, shift: float = 0.0) -> torch.Tensor:
        generators = {row: torch.Generator().manual_seed(100 * seed + row) for row in rows if row not in untrained}
        values = {row: (scale * torch.rand(LENGTHS[row], generator=g) + shift).tolist() for row, g in generators.items()}
        return by_token(packed, values)

    advantages = {row: [(-1.0) ** row * (row + 1)] * LENGTHS[row] for row in rows if row not in untrained}
    own = {"sampler_logp_T": drawn(1, -3), "old_logp_T": drawn(2, -3), "ref_logp_T": drawn(3, -3)}
    given = {"advantages_T": by_token(packed, advantages)} | own | columns
    return packed.with_columns(**{name: values_T for name, values_T in given.items() if values_T is not None})


def output(packed: PackedBatch) -> TokenOutput:
    """Log-probabilities that follow from row and place, and may be differentiated."""
    rows_T = packed.rows_S[packed.segments_T]
    logp_T = -(1 + (rows_T + 0.37 * packed.positions_T).sin().abs()) * packed.loss_mask_T
    entropy_T = (2 + (0.1 * packed.positions_T).cos()) * packed.loss_mask_T
    return TokenOutput(logp_T.float().requires_grad_(), entropy_T.float().requires_grad_(), packed)


def objective(loss="grpo", **changes) -> PolicyObjective:
    settings = {"clip_low": 0.2, "clip_high": 0.28, "aggregation": "token", "beta": 0.1, "importance": "token"} | changes
    return PolicyObjective(loss, max_tokens=MAX_TOKENS, **settings)


def gradients(policy: PolicyObjective, packed: PackedBatch) -> tuple[float, int, dict[int, torch.Tensor]]:
    """Loss sum, count and each row's gradient."""
    given = output(packed)
    out = policy(given, packed)
    out.loss_sum.backward()
    grad_T, bounds = given.values_T.grad, packed.cu_seqlens_S1.tolist()
    spans = zip(packed.rows_S.tolist(), bounds, bounds[1:], strict=False)
    by_row = {row: grad_T[a : a + 1 + LENGTHS[row]] for row, a, _ in spans if row >= 0}
    return float(out.loss_sum.detach()), int(out.count), by_row


VARIANTS = [
    {"loss": loss, "aggregation": aggregation, "importance": importance, "mask_above": mask_above}
    for loss in ("grpo", "cispo", "gspo")
    for aggregation in ("token", "sequence", "constant")
    for importance, mask_above in (("token", None), ("sequence", 1.5))
]


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: " ".join(map(str, variant.values())))
def test_neighbours_in_a_pack_do_not_matter(variant):
    """A response of a pack is weighed, clipped and left out for itself: packed together is packed alone."""
    policy = objective(**variant, entropy=0.01)
    loss, count, together = gradients(policy, batch())
    alone = [gradients(policy, batch([row])) for row in range(len(LENGTHS))]
    assert loss == pytest.approx(sum(each[0] for each in alone), rel=1e-12)
    assert count == sum(each[1] for each in alone)
    for row, grad in together.items():
        torch.testing.assert_close(grad, alone[row][2][row])


@pytest.mark.parametrize("aggregation", ["token", "sequence", "constant"])
def test_a_response_that_is_masked_is_in_no_sum_and_no_count(aggregation):
    policy = objective(aggregation=aggregation)
    packed, without = batch(untrained=[2]), batch([0, 1, 3])
    loss, count, grads = gradients(policy, packed)
    assert (loss, count) == pytest.approx(gradients(policy, without)[:2])
    assert count == (sum(LENGTHS) - LENGTHS[2] if aggregation == "token" else 3)
    assert (grads[2] == 0).all()
    with_it, left = policy(output(packed), packed), policy(output(without), without)
    for name, each in with_it.metrics.items():
        assert [float(value) for value in each] == pytest.approx([float(value) for value in left.metrics[name]]), name


def test_a_pack_of_padding_counts_nothing():
    empty = batch([])
    for aggregation in ("token", "sequence", "constant"):
        out = objective("gspo", aggregation=aggregation)(output(empty), empty)
        assert (out.loss_sum.item(), out.count) == (0, 0)
        assert all((float(total), n) == (0, 0) for total, n in out.metrics.values())
        assert all(float(value) == 0 for value in out.largest.values())


@pytest.mark.parametrize("loss", ["grpo", "cispo", "gspo"])
def test_before_the_update_the_ratio_is_one(loss):
    """Whether its own log-probabilities were scored before, or are taken for the old ones."""
    own_T = output(batch()).values_T.detach()
    for old_T in (own_T, None):
        packed = batch(old_logp_T=old_T, ref_logp_T=own_T, sampler_logp_T=own_T)
        given = output(packed)
        out = objective(loss, importance="sequence")(given, packed)
        means = {name: float(total) / n for name, (total, n) in out.metrics.items()}
        assert (means["ratio"], means["kl"], means["importance_weight"]) == (1, 0, 1)
        assert (means["clip_low"], means["clip_high"], means["sampler_difference"]) == (0, 0, 0)
        assert {name: float(value) for name, value in out.largest.items()} == {"ratio_max": 1, "sampler_difference_max": 0}
        out.loss_sum.backward()
        # the plain policy gradient; of a prompt's log-probabilities, which are constants, gspo has one too
        torch.testing.assert_close(given.values_T.grad * packed.loss_mask_T, -packed.column("advantages_T"))


def test_reported_is_what_is_measured():
    for beta in (0.0, 0.1):
        policy = objective(beta=beta)
        out = policy(output(batch()), batch())
        assert set(out.metrics) == set(policy.reported) and set(out.largest) == set(policy.largest)
        assert ("kl" in policy.reported) == (beta > 0)


def test_without_a_reference_none_is_read():
    packed = batch(ref_logp_T=None)
    assert math.isfinite(objective(beta=0.0)(output(packed), packed).loss_sum.item())


def test_clipped_tokens_have_no_gradient_and_are_counted():
    own_T = output(batch()).values_T.detach()
    mask_T = batch().loss_mask_T
    shift_T = torch.where(torch.arange(len(own_T)) % 2 == 0, 0.5, -0.5) * mask_T
    packed = batch(old_logp_T=own_T - shift_T, sampler_logp_T=own_T - shift_T)
    given = output(packed)
    out = objective(beta=0.0)(given, packed)
    out.loss_sum.backward()
    high_T = (shift_T > 0) & (packed.column("advantages_T") > 0)
    low_T = (shift_T < 0) & (packed.column("advantages_T") < 0)
    assert int(high_T.sum()) and int(low_T.sum())
    assert float(out.metrics["clip_high"][0]) == int(high_T.sum()) and float(out.metrics["clip_low"][0]) == int(low_T.sum())
    assert ((given.values_T.grad == 0) == (high_T | low_T | ~mask_T)).all()
    assert float(out.largest["ratio_max"]) == pytest.approx(math.exp(0.5))


def test_weights_are_cut_at_the_cap_and_left_out_beyond_the_bound():
    packed = batch()
    old_T = torch.zeros(len(packed.tokens_T), dtype=torch.float64)
    ratios = torch.tensor([3.0, 0.5], dtype=torch.float64)
    sampler_T = -ratios.log()[packed.segments_T % 2] * packed.loss_mask_T
    given = output(packed)
    apart_T = old_T - sampler_T
    token = importance_weights("token", apart_T, 2.0, None)
    assert sorted(set(token.weight_T[packed.loss_mask_T].tolist())) == pytest.approx([0.5, 2.0])
    assert not token.left_out_T.any()
    assert token.cut_T.equal((packed.segments_T % 2 == 0) & packed.loss_mask_T)
    left = importance_weights("token", apart_T, 2.0, 2.5)
    assert left.left_out_T.equal(token.cut_T) and (left.weight_T[left.left_out_T] == 0).all()
    both = importance_weights("none", apart_T, 2.0, 1.9)  # above 1.9 and below 1 / 1.9
    assert both.left_out_T.equal(packed.loss_mask_T) and not both.cut_T.any()
    whole = importance_weights("sequence", given.segment_sums(apart_T)[packed.segments_T], 1e6, None)
    for row, (length, ratio) in enumerate(zip(LENGTHS, [3.0, 0.5, 3.0, 0.5], strict=True)):
        assert whole.weight_T[packed.segments_T == row].tolist() == pytest.approx([ratio**length] * (2 + length))


def test_estimators_of_the_divergence():
    generator = torch.Generator().manual_seed(0)
    policy, reference = (torch.randn(50, dtype=torch.float64, generator=generator).log_softmax(-1) for _ in range(2))
    truth = float((policy.exp() * (policy - reference)).sum())
    for kind in ("k1", "k3"):  # unbiased
        assert float((policy.exp() * divergence(kind, policy, reference)).sum()) == pytest.approx(truth, rel=1e-12)
    for kind in ("k2", "k3"):  # never negative
        assert (divergence(kind, policy, reference) >= 0).all()
    for kind in ("k1", "k2", "k3"):
        assert (divergence(kind, policy, policy) == 0).all()


@pytest.mark.parametrize(
    ("given", "low", "high", "aggregation"),
    [
        ({}, 0.2, 0.2, "token"),
        ({"loss": "dapo"}, 0.2, 0.28, "token"),
        ({"loss": "cispo"}, 1.0, 0.28, "token"),
        ({"loss": "gspo"}, 3e-4, 4e-4, "sequence"),
        ({"loss": "gspo", "clip_low": 0.1, "aggregation": "constant"}, 0.1, 4e-4, "constant"),
    ],
)
def test_settings_become_the_objective(given, low, high, aggregation):
    policy = PolicyObjective.of(PolicySettings(**given), max_tokens=99)
    assert (policy.loss, policy.max_tokens) == (given.get("loss", "grpo"), 99)
    assert (policy.clip_low, policy.clip_high, policy.aggregation) == (low, high, aggregation)
    assert (policy.beta, policy.kl, policy.importance, policy.importance_cap) == (0.01, "k3", "token", 2.0)


def test_values_by_token():
    packed = pack([TokenizedRow(7, [5, 6, 7], [IGNORE, 6, 7]), TokenizedRow(4, [8, 9], [8, 9])], Alignment(1, 8))
    laid_T = by_token(packed, {4: [0.5], 7: [1.0, 2.0]})
    assert laid_T.tolist() == [1.0, 2.0, 0.0, 0.5, 0, 0, 0, 0] and laid_T.dtype == torch.float32
    with pytest.raises(ValueError, match="row 7 has 2 trained tokens, but 3 values"):
        by_token(packed, {4: [0.5], 7: [1.0, 2.0, 3.0]})
    with pytest.raises(ValueError, match="row 4 has 1 trained tokens, but 0 values"):
        by_token(packed, {7: [1.0, 2.0]})
    assert by_token(pack([], Alignment(1, 4)), {}).tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("aggregation", ["token", "sequence", "constant"])
def test_a_step_s_figures_are_means_over_its_trained_tokens(aggregation):
    """Of two updates as of one over both, whatever the loss counts; the updates have 19 tokens and 4."""
    policy = objective(aggregation=aggregation)

    def update(rows) -> tuple[BatchLoss, int]:
        packed = batch(rows)
        out = policy(output(packed), packed)
        means = {name: float(total / count) for name, (total, count) in out.metrics.items()}
        largest = {name: float(value) for name, value in out.largest.items()}
        return BatchLoss(float(out.loss_sum.detach()), int(out.count), means | largest), int(packed.loss_mask_T.sum())

    (first, many), (second, few) = update([0, 2]), update([1, 3])
    whole, tokens = update([0, 1, 2, 3])
    assert (many, few, tokens) == (19, 4, 23)
    found = over_updates([first, second], [many, few], policy.largest)
    assert found == pytest.approx(whole.metrics, rel=1e-9) and found.keys() == whole.metrics.keys()
    assert found["kl"] != pytest.approx((first.metrics["kl"] + second.metrics["kl"]) / 2, rel=1e-2)
