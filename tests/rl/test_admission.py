"""Asking and training in order, on random schedules of a simulated fleet: bound, order, nothing lost, the same after a resume.

A fleet's schedule is drawn: when prompts are asked, in which order they are answered, when answers are lost, when a step trains,
and when the run is killed and goes on from its state. The verdict on a place is drawn once.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tulu_mega.rl.admission import Admission, Share


@dataclass
class Fleet:
    """A run of some steps by a schedule that is drawn.

    Args:
        make: makes the admission, also after each kill.
        lifelike: long answers come late; otherwise answers come in any order.
    """

    draw: random.Random
    batch: int
    lag: int
    tries: int
    worth: float
    """share of the prompts that teach something"""
    make: type[Admission] = Admission
    lifelike: bool = False
    trained: dict[int, int] = field(default_factory=dict)
    """by place, the step that it belongs to"""
    version_of: dict[int, int] = field(default_factory=dict)
    asked: dict[int, int] = field(default_factory=dict)
    """places that wait for their verdicts -> their lengths"""
    shares: list[Share] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.seed = self.draw.getrandbits(60)
        self.drawn: dict[int, tuple[bool, float]] = {}
        self.admission = self.make(self.batch, self.lag, self.tries)

    def of(self, place: int) -> tuple[bool, float]:
        """Whether a place teaches something, and the length of its answer, which have to do with one another."""
        if place not in self.drawn:
            draw = random.Random(self.seed + place)
            length = draw.lognormvariate(0, 0.8)
            self.drawn[place] = draw.random() < self.worth, length
        return self.drawn[place]

    def run(self, steps: int) -> Fleet:
        version = 0
        while version < steps:
            actions = [self.ask] * 3 + [self.answer] * 6 + [self.train] * 3 + [self.lose, self.resume]
            version = self.draw.choice(actions)(version)
        return self

    def ask(self, version: int) -> int:
        room = self.admission.room(version)
        assert self.asked or self.admission.closed(version) or room >= self.admission.need >= 1, "nobody is asked: it starves"
        for place in self.admission.admit(self.draw.randint(0, room), version):
            self.version_of[place], self.asked[place] = version, self.of(place)[1]
        return version

    def answer(self, version: int) -> int:
        if self.asked:
            first = min(self.asked, key=self.asked.get) if self.lifelike else self.draw.choice(sorted(self.asked))
            del self.asked[first]
            self.admission.tell(first, self.of(first)[0])
        return version

    def train(self, version: int) -> int:
        if not self.admission.closed(version):
            return version
        share = self.admission.take(version)
        self.shares.append(share)
        for place in range(share.first, share.end):
            assert place not in self.trained, f"place {place} is trained twice"
            self.trained[place] = version
            if self.of(place)[0]:
                assert 0 <= version - self.version_of[place] <= self.lag, f"place {place} is too old"
        return version + 1

    def lose(self, version: int) -> int:
        """The servers are gone: what was asked last, and nobody answered, is asked again."""
        place = self.admission.place
        while place - 1 in self.asked and self.draw.random() < 0.7:
            place -= 1
            del self.asked[place]
        if place < self.admission.place:
            self.admission.withdraw(place)
        return version

    def resume(self, version: int) -> int:
        """Another process goes on from the state; it waits for the same answers."""
        state = json.loads(json.dumps(self.admission.state))
        again = self.make(self.batch, self.lag, self.tries)
        again.restore(state)
        assert again.state == state and again.room(version) == self.admission.room(version)
        self.admission = again
        return version


def in_order(fleet: Fleet, steps: int) -> list[Share]:
    """The steps' places by rounds that are asked and judged one after the other, as without any lag."""
    place, shares = 0, []
    for step in range(steps):
        first, worth, rounds = place, 0, 0
        while rounds < fleet.tries and worth < fleet.batch:
            count = fleet.batch - worth
            worth += sum(fleet.of(each)[0] for each in range(place, place + count))
            place, rounds = place + count, rounds + 1
        shares.append(Share(step, first, place, worth, rounds))
    return shares


fleets = st.tuples(
    st.integers(0, 2**40), st.integers(1, 5), st.integers(0, 4), st.integers(1, 4), st.sampled_from([0.0, 0.3, 0.7, 1.0])
)


def check_schedules(given_fleet, make: type[Admission] = Admission) -> None:
    seed, *sizes = given_fleet
    steps, fleet = 6, Fleet(random.Random(seed), *sizes, make=make)
    fleet.run(steps)
    assert fleet.shares == in_order(fleet, steps)
    assert sorted(fleet.trained) == list(range(fleet.shares[-1].end)), "every place once, in order"


@settings(max_examples=100, deadline=None)
@given(fleets)
def test_any_schedule_keeps_bound_and_order_and_loses_nothing(given_fleet):
    check_schedules(given_fleet)


@pytest.mark.acceptance
@settings(max_examples=10_000, deadline=None)
@given(fleets)
def test_ten_thousand_schedules(given_fleet):
    check_schedules(given_fleet)


class Forgetful(Admission):
    """After a resume it counts what is under way as room (AReaL had it so)."""

    extra = 0

    def restore(self, state):
        super().restore(state)
        self.extra = self.outstanding

    def room(self, version, last=None):
        return super().room(version, last) + self.extra


class AtAdmission(Admission):
    """It looks at the lag when a prompt is asked: the step being filled is not too far ahead."""

    def room(self, version, last=None):
        return self.batch if self._filling.step <= version + self.lag else 0


class InAnyOrder(Admission):
    """A step takes what is judged first."""

    def tell(self, place, worth):
        super().tell(self._front, worth)


@pytest.mark.parametrize("mutant", [Forgetful, AtAdmission, InAnyOrder])
def test_planted_faults_are_found(mutant):
    def fails(seed: int) -> bool:
        draw = random.Random(seed)
        try:
            check_schedules((seed, draw.randint(1, 5), draw.randint(0, 4), draw.randint(1, 4), 0.7), mutant)
        except (AssertionError, ValueError):
            return True
        return False

    assert any(fails(seed) for seed in range(100))


def test_what_cannot_be_is_refused():
    admission = Admission(2, 1)
    with pytest.raises(ValueError, match="5 places are to be asked of version 0, which has room for 4"):
        admission.admit(5, 0)
    assert admission.admit(4, 0) == range(4)
    admission.tell(1, True)
    for wrong in (1, 4):
        with pytest.raises(ValueError, match=f"place {wrong} is not one that waits"):
            admission.tell(wrong, True)
    with pytest.raises(ValueError, match="not all without a verdict"):
        admission.withdraw(1)
    with pytest.raises(ValueError, match="step 0 cannot be trained now: none is ready"):
        admission.take(0)
    admission.tell(0, False)
    assert admission.take(0) == Share(0, 0, 2, 1, 1)
    with pytest.raises(ValueError, match="at least 1"):
        Admission(0, 0)


def test_what_takes_no_part_in_a_run_is_not_asked():
    admission = Admission(4, 3)
    assert admission.room(0) == 16 and admission.room(0, last=1) == 8


def distance(ours: list[float], theirs: list[float]) -> float:
    """Kolmogorov's and Smirnov's, over its critical value at one in a thousand."""
    ours, theirs = np.sort(ours), np.sort(theirs)
    at = np.concatenate([ours, theirs])
    apart = np.abs(np.searchsorted(ours, at, "right") / len(ours) - np.searchsorted(theirs, at, "right") / len(theirs)).max()
    return apart / (1.95 * np.sqrt((len(ours) + len(theirs)) / (len(ours) * len(theirs))))


def dropping(draw: random.Random, batch: int, lag: int, steps: int) -> list[float]:
    """Lengths that are trained on where a step takes what is answered first and what is too old is dropped.

    Servers answer so many prompts at once; a step trains in the time of a tenth of a mean answer.
    """
    now, under_way, lengths = 0.0, [], []
    for version in range(steps):
        taken = 0
        while taken < batch:
            while len(under_way) < 4 * batch:
                length = draw.lognormvariate(0, 0.8)
                under_way.append((now + length, length, version))
            end, length, asked_of = min(under_way)
            under_way.remove((end, length, asked_of))
            now = max(now, end)
            if version - asked_of <= lag:
                lengths.append(length)
                taken += 1
        now += 0.1
    return lengths


def test_what_is_trained_is_as_long_as_what_was_drawn_and_dropping_makes_it_shorter():
    """Two samples of the same size; long answers come late in both."""
    draw = random.Random(7)
    truth = [draw.lognormvariate(0, 0.8) for _ in range(4000)]
    fleet = Fleet(random.Random(1), batch=16, lag=2, tries=1, worth=1.0, lifelike=True).run(100)
    ours = [fleet.of(place)[1] for place in fleet.trained]
    dropped = dropping(random.Random(1), batch=16, lag=2, steps=100)
    assert len(ours) == len(dropped) == 1600
    assert distance(ours, truth) < 1 < 2 < distance(dropped, truth)
    assert np.mean(dropped) < 0.9 * np.mean(truth)
