"""When a run's checkpoints are written, and how a run ends with one; the seconds of a step's parts."""

from __future__ import annotations

import pytest

from tulu_mega.errors import Stopped, UserError
from tulu_mega.train.save_schedule import Known, SaveSchedule
from tulu_mega.train.step_clock import StepClock


class Calls:
    """A saver that only remembers what was asked of it."""

    def __init__(self) -> None:
        self.made: list = []

    def poll(self, writing: bool | None = None) -> None:
        self.made.append("poll" if writing is None else f"poll {writing}")

    def save(self, step: int, state: dict) -> None:
        self.made.append((step, state))

    def finish(self) -> None:
        self.made.append("finish")


def never() -> bool:
    return False


def state_at(step: int) -> dict:
    return {"at": step}


@pytest.mark.parametrize(("every", "saved"), [(None, [5]), (2, [2, 4, 5]), (5, [5])])
def test_checkpoints_are_saved_when_due_and_after_the_last_step(every, saved):
    saver = Calls()
    saves = SaveSchedule(saver, every, 5, never)
    for done in range(1, 6):
        saves.after_step(done, lambda done=done: state_at(done))
    assert [call for call in saver.made if call != "poll"] == [(step, state_at(step)) for step in saved]
    assert saver.made.count("poll") == 5
    saves.finish()
    assert saver.made[-1] == "finish"


def test_no_state_is_asked_for_when_nothing_is_due():
    SaveSchedule(Calls(), None, 5, never).after_step(1, lambda: pytest.fail("a collective that nobody else takes part in"))


def test_a_run_that_is_asked_to_stop_ends_with_a_checkpoint_on_disk():
    saver = Calls()
    with pytest.raises(Stopped) as stopped:
        SaveSchedule(saver, None, 5, lambda: True).after_step(3, lambda: state_at(3))
    assert stopped.value.step == 3 and saver.made == ["poll", (3, state_at(3)), "finish"]


def test_what_every_rank_knows_is_not_asked_again():
    saver = Calls()
    saves = SaveSchedule(saver, 4, 5, lambda: pytest.fail("a collective for which all would wait"))
    saves.after_step(1, dict, known=Known(asked=False, writing=True))
    with pytest.raises(Stopped):
        saves.after_step(2, dict, known=Known(asked=True, writing=False))
    assert saver.made == ["poll True", "poll False", (2, {}), "finish"]
    with pytest.raises(Stopped):  # where a checkpoint is due, a signal that came behind the loss counts too
        SaveSchedule(saver, 4, 5, lambda: True).after_step(4, dict, known=Known(asked=False, writing=False))


@pytest.mark.parametrize("stop", [False, True])
def test_a_failure_ends_the_run_with_a_checkpoint_on_disk(stop):
    saver, failure, asked = Calls(), UserError("a spike"), []

    def stop_requested() -> bool:
        asked.append(True)
        return stop

    saves = SaveSchedule(saver, None, 5, stop_requested)
    with pytest.raises(UserError, match="a spike"):
        saves.after_step(3, lambda: state_at(3), failure)
    assert saver.made == ["poll", (3, state_at(3)), "finish"] and asked == [True]
    saver.made.clear()
    with pytest.raises(UserError, match="a spike"):
        saves.end(3, state_at(3), failure)
    assert saver.made == [(3, state_at(3)), "finish"]


def test_the_seconds_of_saving_are_given_once(monkeypatch):
    times = iter([10.0, 12.5])
    monkeypatch.setattr("tulu_mega.train.save_schedule.time.perf_counter", lambda: next(times))
    saves = SaveSchedule(Calls(), 1, 5, never)
    assert saves.take_seconds() == 0.0
    saves.after_step(1, dict)
    assert (saves.take_seconds(), saves.take_seconds()) == (2.5, 0.0)


def test_parts_of_a_step_are_marked_and_their_seconds_add_up(monkeypatch):
    times = iter([0.0, 1.0, 3.0, 4.0, 4.5, 6.0, 10.0, 20.0])
    monkeypatch.setattr("tulu_mega.train.step_clock.time.perf_counter", lambda: next(times))
    marks: list[str] = []
    clock = StepClock(marks.append)
    with clock.part("data"):
        pass
    with clock.part("data"):
        pass
    assert clock.seconds == {"data": 2.5} and clock.whole == 6.0 and marks == ["data", "data"]
    clock.restart()
    assert clock.seconds == {} and clock.whole == 10.0


def test_seconds_that_a_part_measured_for_another_are_moved():
    clock = StepClock(lambda _name: None)
    with clock.part("optimizer"):
        pass
    whole = clock.seconds["optimizer"]
    clock.move(2.0, "optimizer", "passes")
    assert clock.seconds == {"optimizer": whole - 2.0, "passes": 2.0}
