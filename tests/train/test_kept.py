"""Which checkpoints stay while updates are left out, and which one a run goes on from."""

from __future__ import annotations

import json

import pytest

from tulu_mega.errors import UserError
from tulu_mega.train.checkpoint import find
from tulu_mega.train.kept import advice, newest, prune


@pytest.fixture
def saved(tmp_path):
    """Saves a step as a run does, and removes what need not stay."""

    def write(step: int, streak: int = 0, finite: bool | None = True, keep: int = 2) -> list[int]:
        place = tmp_path / f"step_{step:08d}"
        place.mkdir()
        told = {"step": step, "state": {"skipped_in_a_row": streak}, "format": "reshardable"}
        told |= {"files": {}, "model": {}, "layout": []}
        (place / "training.json").write_text(json.dumps(told if finite is None else told | {"finite": finite}))
        prune(tmp_path, keep, step)
        return [checkpoint.step for checkpoint in find(tmp_path)]

    return write


@pytest.mark.parametrize("keep", [1, 2])
def test_the_newest_from_before_a_streak_stays_until_there_is_another(saved, tmp_path, keep):
    steps = [saved(step, keep=keep)[-1] for step in (1, 2, 3)]
    assert steps == [1, 2, 3]
    for step, streak in ((4, 1), (5, 2), (6, 3)):
        assert saved(step, streak, keep=keep) == [3, *range(max(4, step - keep + 1), step + 1)]
    assert newest(tmp_path).step == 6, "a run that was asked to end goes on where it was"
    assert "remove step_00000006" in advice(tmp_path, newest(tmp_path)).replace("step_00000005, ", "")
    assert saved(7, keep=keep) == [6, 7][-keep:]
    assert advice(tmp_path, newest(tmp_path)) == ""


def test_a_run_goes_on_before_its_weights_broke(saved, tmp_path, capsys):
    saved(3)
    saved(4, finite=False)
    assert saved(5, streak=1, finite=False) == [3, 4, 5]
    assert newest(tmp_path).step == 3
    assert "the weights of step_00000004, step_00000005 have NaN or infinity" in advice(tmp_path, newest(tmp_path))
    (tmp_path / "step_00000004").rename(tmp_path / "away")
    assert saved(4) == [3, 4], "what a run that was put back had saved later"


def test_where_no_weights_are_finite_nothing_goes_on(saved, tmp_path):
    assert newest(tmp_path) is None
    saved(1, finite=False)
    with pytest.raises(UserError, match="step_00000001"):
        newest(tmp_path)


def test_older_checkpoints_are_taken_for_sound(saved, tmp_path):
    saved(1, finite=None)
    assert newest(tmp_path).healthy and newest(tmp_path).random == "first copy's"
