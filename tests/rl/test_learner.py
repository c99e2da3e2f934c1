"""Steps that teach nothing, and when a policy is evaluated."""

from __future__ import annotations

from pathlib import Path

import pytest

from tulu_mega.errors import UserError
from tulu_mega.rl.evaluator import Evaluator
from tulu_mega.rl.learner import EmptySteps


def test_too_many_empty_steps_in_a_row_end_the_run():
    empty = EmptySteps(2, Path("run/rollouts"))
    for step, nothing in enumerate([True, False, True], 1):
        empty.note(step, nothing)
    assert empty.in_a_row == 1
    with pytest.raises(UserError, match=r"stopped at step 4: in 2 steps in a row no prompt .* look at run/rollouts: the task"):
        empty.note(4, empty=True)


@pytest.mark.parametrize(
    ("every", "start", "due"),
    [(0, 0, []), (3, 0, [0, 3, 6, 7]), (3, 3, [6, 7]), (3, 4, [6, 7]), (100, 0, [0, 7])],
    ids=["never", "fresh", "resumed after an evaluation", "resumed between", "rarely"],
)
def test_a_policy_is_evaluated_before_the_first_step_every_so_many_and_after_the_last(every, start, due):
    evaluator = Evaluator(None, Path("run"), every, start, 7, None, None, None)
    assert [done for done in range(start, 8) if evaluator.due(done)] == due
