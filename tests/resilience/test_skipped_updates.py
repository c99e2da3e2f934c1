"""A run all of whose updates were left out ends with a message instead of a model."""

from __future__ import annotations

import pytest

from tulu_mega.errors import UserError
from tulu_mega.resilience.skipped_updates import SkippedUpdates


def updates(place, *finite: bool) -> SkippedUpdates:
    skipped = SkippedUpdates(9, place / "skipped.jsonl")
    for step, each in enumerate(finite, 1):
        skipped.note(each, step, 1.0, 1.0, list, write=False)
    return skipped


def test_one_finite_update_is_enough(tmp_path):
    updates(tmp_path, False, True, False).check_learned()


@pytest.mark.parametrize(("count", "told"), [(3, "any of its 3 updates"), (0, "nothing to learn from in any step")])
def test_a_run_without_one_has_learned_nothing_also_when_it_goes_on(tmp_path, count, told):
    skipped = updates(tmp_path, *[False] * count)
    again = updates(tmp_path)
    again.restore(skipped.state)
    for each in (skipped, again):
        with pytest.raises(UserError, match=f"nothing was learned, and no model is exported: .*{told}"):
            each.check_learned()


def test_older_checkpoints_have_the_benefit_of_the_doubt(tmp_path):
    skipped = updates(tmp_path)
    skipped.restore({"skipped": 3, "skipped_in_a_row": 1})
    skipped.check_learned()
