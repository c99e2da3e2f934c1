"""Draws prompts, has them answered and judged, and decides which responses a step trains on. Rank 0 only."""

from __future__ import annotations

import random
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any, Protocol

from tulu_mega.config import PolicyRunSettings
from tulu_mega.data.prompts import Prompt, PromptSet, PromptStream
from tulu_mega.inference.sampling import Sampling
from tulu_mega.objectives.advantages import AdvantageEstimator, penalised
from tulu_mega.records import Response
from tulu_mega.rewards.verdict import Verdict
from tulu_mega.rl.admission import Admission
from tulu_mega.rl.judging import JudgedResponse, Rewards
from tulu_mega.rl.rollouts import Answers, Evaluation, Group, Round, StepRollouts
from tulu_mega.weight_transfer.server import ServerFailure
from tulu_mega.weight_transfer.waiting import in_daemon_thread

Done = Callable[[int, list[Response]], None]


class Generates(Protocol):
    """Answers prompts, as :class:`tulu_mega.rl.fleet.FleetClient` does."""

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        version: int,
        numbers: Sequence[int] | None = None,
        done: Done | None = None,
    ) -> list[list[Response]]: ...

    def attempt(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        version: int,
        numbers: Sequence[int] | None = None,
        done: Done | None = None,
    ) -> list[list[Response]]: ...

    def failed(self, failure: ServerFailure) -> None: ...


class Scheduler:
    """Asks the prompts of each step of the weights that it begins with, or of up to `train.max_policy_lag` steps before.

    Reproducible: prompts and the random stream of each response follow from the seed and the place in the stream of prompts, and
    the prompts that weights of a version are asked follow from the verdicts on those asked before, not from when these came. All
    prompts that are asked at once go to the servers together, so that a batch decides its own rounding.

    With a lag, a thread asks servers while the caller trains; :meth:`quiet` waits for it before the servers' weights change.

    Args:
        prompts: the prompts that are drawn.
        generator: answers them.
        rewards: judges the responses.
        estimator: gives the responses to a prompt their advantages.
        settings: the run's.
        ends: tokens that end a response, besides those that the servers' model directory names: the tokenizer's eos. Servers
            know no tokenizer.
        steps: of the whole run, beyond which nothing is asked; None: there is no last one.
    """

    def __init__(
        self,
        prompts: PromptSet,
        generator: Generates,
        rewards: Rewards,
        estimator: AdvantageEstimator,
        settings: PolicyRunSettings,
        ends: tuple[int, ...],
        steps: int | None = None,
    ):
        self._prompts, self._generator, self._rewards, self._settings = prompts, generator, rewards, settings
        self._estimator, self._ends = estimator, ends
        self._stream = PromptStream(len(prompts), settings.seed, settings.data.shuffle)
        self._last = None if steps is None else steps - 1
        self._line = self._begun(0, 0)
        self._rounds: deque[Round] = deque()
        """asked, of which no verdict has been looked at yet"""
        self._groups: dict[int, Group] = {}
        """judged, of steps to come"""

    @property
    def state(self) -> dict[str, Any]:
        """The state that a checkpoint keeps beside what is :attr:`under_way`. No servers may be at work; see `quiet`."""
        return {"place": self._line.place, "line": self._line.state}

    @property
    def under_way(self) -> tuple[list[Group], list[Round]]:
        """What is answered and not trained on: judged groups, and rounds of which no verdict has been looked at."""
        return [self._groups[place] for place in sorted(self._groups)], list(self._rounds)

    def restore(self, state: Mapping[str, Any], step: int, groups: Sequence[Group] = (), rounds: Sequence[Round] = ()) -> None:
        """Go on from a checkpoint.

        Args:
            state: as it was.
            step: steps done.
            groups, rounds: what was under way.
        """
        self._line = self._begun(step, state["place"])
        if "line" in state:  # those of before have the place alone
            self._line.restore(state["line"])
        self._groups, self._rounds = {group.place: group for group in groups}, deque(rounds)

    def next(self, version: int) -> StepRollouts:
        """The groups of a step, in the order of the stream; in the place of those that teach nothing, others, up to
        `train.refills` times. Then servers are asked for later steps, as far as the lag allows, while the caller goes on.

        Verdicts may be late by a whole step where the lag is 2 or more: only those that this step needs are waited for.

        Args:
            version: steps done, which is the version of the newest weights.

        Raises:
            ServerFailure: no server answers.
        """
        step = StepRollouts(version)
        patience = min(max(self._line.lag, 1), 2)
        while self._rounds and self._rounds[0].version <= version - patience:
            self._settle(step)
        while not self._line.closed(version):
            if not self._rounds:
                self._ask(step)
            self._settle(step)
        self._take(step)
        if count := self._line.room(version, self._last):
            places = self._line.admit(count, version)
            self._rounds.append(Round(version, places, in_daemon_thread(partial(self._drawn, places, version, True))))
        return step

    def quiet(self) -> None:
        """Wait until the servers have answered what they are asked; prompts that they failed to answer will be asked again.

        Raises:
            UserError: what the prompts have that no server takes, or the servers failed too often.
        """
        try:
            for each in self._rounds:
                each.answers.result()
        except ServerFailure as failure:  # of the last one: the others were waited for before it was asked
            self._line.withdraw(self._rounds.pop().places.start)
            self._generator.failed(failure)

    def evaluate(self, prompts: PromptSet, version: int) -> Evaluation:
        """The most probable response to each prompt, judged by its verifiers.

        Args:
            version: version of the weights that are to answer.

        Raises:
            ServerFailure: no server answers.
        """
        sampling = Sampling(max_tokens=self._settings.sampling.max_tokens, stop_ids=self._ends)
        found = self._answered(prompts.prompts, sampling, version)
        judged = self._rewards.finish(found.responses, found.verdicts, greedy=True)
        return Evaluation(prompts, [one for (one,) in judged])

    def prompt(self, place: int) -> Prompt:
        """The prompt at a place of the stream."""
        return self._prompts[self._stream[place]]

    def _begun(self, step: int, place: int) -> Admission:
        train = self._settings.train
        return Admission(train.prompts, train.max_policy_lag, train.refills + 1, step, place)

    def _ask(self, step: StepRollouts) -> None:
        """Have the prompts answered that a step needs next, and wait for the responses."""
        version, places = step.version, self._line.admit(self._line.need, step.version)
        answers: Future[Answers] = Future()
        try:
            answers.set_result(self._drawn(places, version))
        except BaseException:
            self._line.withdraw(places.start)
            raise
        step.generating += answers.result().seconds
        self._rounds.append(Round(version, places, answers))

    def _settle(self, step: StepRollouts) -> None:
        """Wait for the verdicts on the prompts that were asked first, and note which are worth training on.

        Args:
            step: waits for them.
        """
        settings = self._settings
        asked = self._rounds[0]
        answers, places = asked.answers.result(), asked.places
        began = time.perf_counter()
        judged = self._rewards.finish(answers.responses, answers.verdicts)
        self._rounds.popleft()
        step.judging += time.perf_counter() - began
        rewards = [self._rewards_of(*each) for each in zip(places, judged, strict=True)]
        if settings.rewards.shuffle and settings.sampling.samples == 1:
            rewards = [[reward] for reward in self._dealt([reward for (reward,) in rewards], places[0])]
        for each in zip(places, judged, rewards, strict=True):
            group = self._groups[each[0]] = self.group(*each, answers.seconds / len(places))
            self._line.tell(group.place, self._worth(group))

    def _take(self, step: StepRollouts) -> None:
        """Give a step its groups."""
        share = self._line.take(step.version)
        step.rounds = share.rounds
        for place in range(share.first, share.end):
            group = self._groups.pop(place)
            (step.groups if self._worth(group) else step.left_out).append(group)
            step.answering += group.seconds

    def _worth(self, group: Group) -> bool:
        """Whether a group is trained on."""
        return group.advantages.informative if self._settings.train.filter_equal else any(group.advantages.trained)

    def _drawn(self, places: range, version: int, beside: bool = False) -> Answers:
        """The responses to the prompts at some places.

        Args:
            beside: in a thread beside training, in which servers that fail cannot be given weights and asked again.
        """
        settings = self._settings.sampling
        sampling = Sampling(
            max_tokens=settings.max_tokens,
            temperature=settings.temperature,
            top_p=settings.top_p,
            samples=settings.samples,
            seed=self._settings.seed,
            stop_ids=self._ends,
        )
        return self._answered([self.prompt(place) for place in places], sampling, version, list(places), beside)

    def _answered(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        version: int,
        numbers: Sequence[int] | None = None,
        beside: bool = False,
    ) -> Answers:
        """The responses to each prompt and their future verdicts; verifiers work while other prompts are still answered."""
        verdicts: dict[int, list[Future[Verdict]]] = {}

        def done(index: int, responses: list[Response]) -> None:
            verdicts[index] = self._rewards.begin(prompts[index], responses)

        began = time.perf_counter()
        ask = self._generator.attempt if beside else self._generator.generate
        answers = ask([prompt.ids for prompt in prompts], sampling, version, numbers, done)
        return Answers(answers, [verdicts[index] for index in range(len(prompts))], time.perf_counter() - began)

    def _rewards_of(self, place: int, judged: list[JudgedResponse]) -> list[float | None]:
        """The rewards of the responses to a prompt, penalties for length among them.

        Lengths are looked at here, where the group is whole. `rewards.shuffle` deals the rewards out among the responses, with
        the penalties for length: left with the responses they belong to, those would teach length.
        """
        policy = self._settings.policy
        rewards = [one.reward for one in judged]
        if policy.overlong == "penalise":
            rewards = penalised(rewards, _cut_off(judged), policy.overlong_reward)
        return self._dealt(rewards, place) if self._settings.rewards.shuffle else rewards

    def _dealt(self, rewards: list[float | None], place: int) -> list[float | None]:
        random.Random(f"{self._settings.seed} {place}").shuffle(rewards)
        return rewards

    def group(self, place: int, judged: list[JudgedResponse], rewards: list[float | None], seconds: float) -> Group:
        """The responses to the prompt at a place, with their advantages.

        Args:
            rewards: what these are estimated from.
            seconds: see `Group`.
        """
        masked = [cut and self._settings.policy.overlong == "mask" for cut in _cut_off(judged)]
        return Group(place, self.prompt(place), judged, self._estimator(rewards, masked), seconds)


def _cut_off(judged: Sequence[JudgedResponse]) -> list[bool]:
    return [one.response.finish_reason == "length" for one in judged]
