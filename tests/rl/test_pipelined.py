"""Servers that answer while a step trains: the same rollouts whatever the timing, over kills and lost servers, and no wait for a
slow verifier. Servers, verifiers and trainer are the test's."""

from __future__ import annotations

import random
import threading
from collections.abc import Collection
from concurrent.futures import Future

import pytest

from tulu_mega.config import GrpoSettings
from tulu_mega.data.prompts import Prompt, PromptSet
from tulu_mega.errors import UserError
from tulu_mega.objectives.advantages import ESTIMATORS
from tulu_mega.records import Response
from tulu_mega.rewards.verdict import Verdict
from tulu_mega.rl import under_way
from tulu_mega.rl.judging import JudgedResponse
from tulu_mega.rl.scheduler import Scheduler
from tulu_mega.weight_transfer.server import ServerFailure

PATIENCE = 60
"""Seconds after which a test gives up."""
STEPS = 6


class Servers:
    """Answer as prompt, version and number say.

    Args:
        held: servers answer nothing, beside training, until the trainer waits for them.
        fails: versions at which they die, once each.
    """

    def __init__(self, held: bool = False, fails: tuple[int, ...] = ()):
        self.asked: list[tuple[int, list[int]]] = []
        self.restarted = 0
        self.free = threading.Event()
        self._held, self._fails = held, list(fails)

    def generate(self, prompts, sampling, version, numbers=None, done=None):
        self.asked.append((version, list(numbers)))
        answers = [self._answer(prompt, sampling, version, number) for prompt, number in zip(prompts, numbers, strict=True)]
        for index in sorted(range(len(prompts)), key=lambda index: random.Random(f"{version} {numbers[index]}").random()):
            done(index, answers[index])
        return answers

    def attempt(self, prompts, sampling, version, numbers=None, done=None):
        assert not self._held or self.free.wait(PATIENCE)
        if version in self._fails:
            self._fails.remove(version)
            self.asked.append((version, []))
            raise ServerFailure("http://s", "it is gone")
        return self.generate(prompts, sampling, version, numbers, done)

    def failed(self, failure):
        self.restarted += 1

    def _answer(self, prompt, sampling, version, number):
        draw = random.Random(f"{prompt} {version} {number}")
        made = []
        for _ in range(sampling.samples):
            ids = [draw.randrange(100) for _ in range(draw.randint(1, 5))]
            logp = [-draw.random() for _ in ids]
            made.append(Response.of_one_turn(list(prompt), ids, logp, [version] * len(ids), draw.choice(["stop", "length"])))
        return made


class Verifiers:
    """Judge by the first token: half of the prompts teach nothing.

    Args:
        slow: versions whose responses are judged when they are waited for; others at once.
    """

    def __init__(self, slow: Collection[int] = ()):
        self.slow = slow
        self.waited_for: set[int] = set()
        """versions of responses that were judged when they were waited for"""
        self.begun = 0
        self._waiting: list[tuple[Future, Verdict]] = []

    def begin(self, prompt, responses):
        futures = []
        for one in responses:
            self.begun += 1
            future: Future = Future()
            verdict = Verdict(float(one.last_answer[0] % 2 if prompt.ids[0] % 2 else 1), parts={"v": 1.0})
            if one.versions[0] in self.slow:
                self._waiting.append((future, verdict))
            else:
                future.set_result(verdict)
            futures.append(future)
        return futures

    def finish(self, groups, verdicts, greedy=False):
        wanted = {future for futures in verdicts for future in futures}
        for future, verdict in [each for each in self._waiting if each[0] in wanted]:
            future.set_result(verdict)
            self._waiting.remove((future, verdict))
            self.waited_for.update(one.versions[0] for group in groups for one in group)
        judged = []
        for group, futures in zip(groups, verdicts, strict=True):
            told = [future.result(PATIENCE) for future in futures]
            judged.append([JudgedResponse(one, "", each, each.score) for one, each in zip(group, told, strict=True)])
        return judged


def scheduler_of(lag: int, servers: Servers, verifiers: Verifiers, **train) -> Scheduler:
    given = {"model": "m", "run_dir": "r", "data": "d", "sampling": {"samples": 4, "max_tokens": 8}}
    train = {"prompts": 3, "refills": 2, "max_policy_lag": lag, **train}
    settings = GrpoSettings.model_validate({**given, "train": train, "policy": {"overlong": "keep"}})
    prompts = PromptSet([Prompt([number, 5], [], "", "v", str(number)) for number in range(7)])
    return Scheduler(prompts, servers, verifiers, ESTIMATORS["standardised"], settings, (0,), STEPS)


def told(step) -> tuple:
    """All of a step's rollouts that training and files see."""
    seconds = {"seconds_generation", "seconds_rewards", "seconds_servers", "generated_tokens_per_second"}
    figures = {name: value for name, value in step.figures().items() if name not in seconds}
    groups = [(group.place, group.judged, group.advantages) for group in (*step.groups, *step.left_out)]
    return step.version, len(step.groups), groups, figures


def run(scheduler: Scheduler, servers: Servers, begin: int = 0, between=lambda version, scheduler: scheduler) -> list:
    """The rollouts of all steps, each of which takes until servers must be quiet."""
    steps = []
    for version in range(begin, STEPS):
        servers.free.clear()
        steps.append(told(scheduler.next(version)))
        servers.free.set()
        scheduler.quiet()
        scheduler = between(version + 1, scheduler)
    return steps


@pytest.mark.parametrize("lag", [0, 1, 2, 4])
def test_rollouts_are_the_same_whatever_the_timing(lag):
    quick, slow = Servers(), Servers(held=True)
    steps = run(scheduler_of(lag, quick, Verifiers()), quick)
    assert steps == run(scheduler_of(lag, slow, Verifiers()), slow) and quick.asked == slow.asked
    lags = [figures["policy_lag_max"] for *_, figures in steps]
    assert max(lags) >= min(lag, 2) and all(0 <= each <= min(lag, step) for step, each in enumerate(lags))
    places = sorted(group[0] for _, _, groups, _ in steps for group in groups)
    assert places == list(range(len(places))), "every place once"
    assert sorted(number for _, numbers in quick.asked for number in numbers) == places, "nothing is asked that no step has"


def test_a_lag_asks_beside_training_what_the_next_step_needs():
    servers = Servers()
    steps = run(scheduler_of(1, servers, Verifiers(), refills=0), servers)
    assert servers.asked == [(max(0, step - 1), [3 * step, 3 * step + 1, 3 * step + 2]) for step in range(STEPS)]
    assert [figures["policy_lag"] for *_, figures in steps] == [0, *[1] * (STEPS - 1)]


@pytest.mark.parametrize("lag", [0, 1, 2, 3])
@pytest.mark.parametrize("late", [False, True])
def test_a_run_that_is_killed_after_any_step_goes_on_as_if_nothing_had_been(tmp_path, lag, late):
    """A process of its own goes on from each checkpoint; verdicts that were not there yet are given again."""
    servers, verifiers = Servers(), Verifiers(range(STEPS) if late else ())

    def killed(version, scheduler):
        directory = tmp_path / f"{version}"
        directory.mkdir()
        for name, content in under_way.files(scheduler).items():
            (directory / name).write_bytes(content)
        assert bool(list(directory.iterdir())) == (lag > 0 and version < STEPS)
        again = scheduler_of(lag, servers, verifiers)
        under_way.restore(again, verifiers, scheduler.state, version, directory)
        return again

    steps = run(scheduler_of(lag, servers, verifiers), servers, between=killed)
    others, plain = Servers(), Verifiers()
    assert steps == run(scheduler_of(lag, others, plain), others) and servers.asked == others.asked
    assert late or verifiers.begun == plain.begun, "nothing that has its verdict is judged again"


def test_a_run_goes_on_from_a_checkpoint_of_before(tmp_path):
    """Which knows the place in the stream alone."""
    servers, others = Servers(), Servers()
    scheduler = scheduler_of(0, servers, Verifiers())

    def killed(version, scheduler):
        again = scheduler_of(0, servers, Verifiers())
        under_way.restore(again, Verifiers(), {"place": scheduler.state["place"]}, version, tmp_path)
        return again

    assert run(scheduler, servers, between=killed) == run(scheduler_of(0, others, Verifiers()), others)


def test_lost_servers_are_asked_again_by_the_next_weights():
    servers = Servers(fails=(1, 3))
    steps = run(scheduler_of(1, servers, Verifiers(), refills=0), servers)
    assert servers.restarted == 2
    assert [figures["policy_lag"] for *_, figures in steps] == [0, 1, 0, 1, 0, 1]
    places = [group[0] for _, _, groups, _ in steps for group in groups]
    assert sorted(places) == list(range(3 * STEPS)), "nothing is lost, nothing trained twice"


def test_a_slow_verifier_does_not_stop_the_stream():
    """With a lag of 2 a step's verdicts come while the next trains: nobody waits for them before they are needed."""
    servers, verifiers = Servers(), Verifiers(range(STEPS))
    scheduler = scheduler_of(2, servers, verifiers, refills=0)
    for version in range(STEPS):
        scheduler.next(version)
        assert max(verifiers.waited_for) <= max(version - 2, 0)
        scheduler.quiet()
    assert [version for version, _ in servers.asked] == [0, 0, *range(1, STEPS - 2)]


def test_what_is_under_way_and_cannot_be_read_is_told(tmp_path):
    servers = Servers()
    scheduler = scheduler_of(1, servers, Verifiers())
    scheduler.next(0)
    scheduler.quiet()
    ((name, content),) = under_way.files(scheduler).items()
    for wrong in (content[:-9], b"", b"{}"):
        (tmp_path / name).write_bytes(wrong)
        with pytest.raises(UserError, match=r"rollouts\.json\.gz could not be read .*; remove .* to go on"):
            under_way.restore(scheduler_of(1, servers, Verifiers()), Verifiers(), scheduler.state, 1, tmp_path)


def test_a_bad_prompt_ends_the_run():
    servers = Servers()
    servers.attempt = lambda *_: (_ for _ in ()).throw(UserError("prompt 0 has no tokens"))
    scheduler = scheduler_of(1, servers, Verifiers())
    scheduler.next(0)
    with pytest.raises(UserError, match="no tokens"):
        scheduler.quiet()
