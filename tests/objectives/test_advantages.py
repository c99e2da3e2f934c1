"""Advantages within groups: their invariants, and the formulae by numpy."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tulu_mega.config import PolicySettings
from tulu_mega.objectives.advantages import EPS, ESTIMATORS, GroupAdvantages, penalised

KINDS = list(ESTIMATORS)
rewards = st.one_of(st.none(), st.sampled_from([0.0, 1.0, 10.0, 0.1]), st.floats(-20, 20))
groups = st.lists(st.tuples(rewards, st.booleans()), min_size=1, max_size=16)


def of(group, kind, overlong="keep"):
    return advantages([reward for reward, _ in group], [cut for _, cut in group], kind, overlong)


def advantages(given, truncated, kind, overlong="keep") -> GroupAdvantages:
    """As the scheduler has it."""
    counted = penalised(given, truncated, -10.0) if overlong == "penalise" else given
    return ESTIMATORS[kind](counted, [cut and overlong == "mask" for cut in truncated])


@pytest.mark.parametrize("kind", KINDS)
def test_formulae(kind):
    given_rewards = [10.0, 0.0, 0.0, 10.0, 10.0, 3.0]
    found = advantages(given_rewards, [False] * 6, kind)
    array = np.array(given_rewards)
    want = {
        "centred": array - array.mean(),
        "standardised": (array - array.mean()) / (array.std(ddof=1) + EPS),
        "leave_one_out": array - np.array([np.delete(array, at).mean() for at in range(6)]),
    }[kind]
    np.testing.assert_allclose(found.advantages, want, rtol=1e-12, atol=1e-12)
    assert found.trained == (True,) * 6 and found.rewards == tuple(given_rewards)
    assert (found.failed, found.informative) == (0, True)


@settings(max_examples=300, deadline=None)
@given(group=groups, kind=st.sampled_from(KINDS), data=st.data())
def test_a_group_sums_to_zero_in_any_order(group, kind, data):
    found = of(group, kind)
    counted = [reward for reward, _ in group if reward is not None]
    assert sum(found.advantages) == pytest.approx(0, abs=1e-6 * (1 + sum(map(abs, found.advantages))))
    assert found.failed == len(group) - len(counted)
    assert all(advantage == 0 for advantage, (reward, _) in zip(found.advantages, group, strict=True) if reward is None)
    order = data.draw(st.permutations(range(len(group))))
    other = of([group[at] for at in order], kind)
    assert other.advantages == tuple(found.advantages[at] for at in order)  # the same to the last bit
    assert other.trained == tuple(found.trained[at] for at in order)
    ranked = sorted(counted)
    assert sorted(found.advantages[at] for at, (reward, _) in enumerate(group) if reward is not None) == [
        found.advantages[next(at for at, (reward, _) in enumerate(group) if reward == each)] for each in ranked
    ]  # more reward is more advantage


@settings(max_examples=200, deadline=None)
@given(group=groups, kind=st.sampled_from(KINDS))
def test_masked_after_grouping(group, kind):
    """A response that was cut off stays in its group's statistics; it alone is not trained on."""
    kept, masked = of(group, kind), of(group, kind, "mask")
    assert masked.rewards == kept.rewards
    for at, (reward, cut) in enumerate(group):
        assert masked.trained[at] == (reward is not None and not cut)
        assert masked.advantages[at] == (0.0 if cut else kept.advantages[at])


@settings(max_examples=200, deadline=None)
@given(group=groups, kind=st.sampled_from(KINDS))
def test_penalised_after_grouping(group, kind):
    """It is as if the verifier had given the penalty, whatever it did give, or nothing at all."""
    found = of(group, kind, "penalise")
    assert found == of([(-10.0 if cut else reward, cut) for reward, cut in group], kind)
    assert found.failed == sum(reward is None and not cut for reward, cut in group)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "given_rewards",
    [[0.1] * 7, [1.0], [None, 1.0], [None, None], [None, 10.0, 10.0, None], [1e300, 1e300],
     [0.1 + 0.2, 0.3, 0.3], [0.1 + 0.2 - 0.3, 0.0], [float(np.float32(0.7)), 0.7, None], [-10.0, -10.000001]],
    ids=str,
)  # fmt: skip
def test_a_group_without_a_difference_teaches_nothing(kind, given_rewards):
    found = advantages(given_rewards, [False] * len(given_rewards), kind)
    assert found.advantages == (0.0,) * len(given_rewards) and not found.informative
    assert found.trained == tuple(reward is not None for reward in given_rewards)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("given_rewards", [[1.0, 1.0001], [1e-9, 2e-9], [1e8, 1.001e8], [0.0, 1e-3]], ids=str)
def test_a_small_difference_is_a_difference(kind, given_rewards):
    assert advantages(given_rewards, [False, False], kind).informative


def test_a_difference_that_only_masked_responses_have_teaches_the_others():
    found = advantages([1.0, 1.0, 0.0], [False, False, True], "centred", "mask")
    assert found.trained == (True, True, False) and found.informative
    assert found.advantages == pytest.approx((1 / 3, 1 / 3, 0))
    alone = advantages([0.0, 1.0], [True, True], "centred", "mask")
    assert not alone.informative  # nothing of it is trained


def test_lengths_have_to_match():
    with pytest.raises(ValueError):
        ESTIMATORS["centred"]([1.0, 0.0], [False])
    with pytest.raises(ValueError):
        penalised([1.0, 0.0], [False], -10.0)


def test_a_setting_names_each_estimator():
    assert set(get_args(PolicySettings.model_fields["advantages"].annotation)) == set(ESTIMATORS)
