"""Which prompts are asked and what becomes of their responses: order, refills, failed verifiers, what a checkpoint keeps."""

import json
import math

import pytest

from tulu_mega.config import GrpoSettings
from tulu_mega.data.prompts import PromptSet, PromptStream, read_prompts
from tulu_mega.data.sources import load_rows
from tulu_mega.errors import UserError
from tulu_mega.objectives.advantages import ESTIMATORS, GroupAdvantages
from tulu_mega.quickstart import tiny_model
from tulu_mega.records import Response
from tulu_mega.rewards.registry import Judge
from tulu_mega.rl import journal
from tulu_mega.rl.judging import Rewards
from tulu_mega.rl.scheduler import Scheduler

ENDS = (7,)


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_model.make_tokenizer()


@pytest.fixture(scope="module")
def rewards(tokenizer):
    settings = settings_of().rewards
    with Rewards(settings, ["gsm8k"], tokenizer) as made:
        yield made


def settings_of(**values) -> GrpoSettings:
    given = {"model": "m", "run_dir": "r", "data": "d", "sampling": {"samples": 4, "max_tokens": 8}}
    given["rewards"] = {"scale": 10.0, "workers": 1}
    train = {"prompts": 2, "refills": 2, **values.pop("train", {})}
    return GrpoSettings.model_validate({**given, "train": train, **values})


def row(number: int, truth: str | None = None) -> dict:
    return {"messages": [{"role": "user", "content": f"Say {number}."}], "ground_truth": truth or str(number), "dataset": "gsm8k"}


def prompts_of(tmp_path, rows, tokenizer, **options) -> PromptSet:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join((one if isinstance(one, str) else json.dumps(one)) + "\n" for one in rows), encoding="utf-8")
    options = {"template": "tulu", "max_prompt": 64, "malformed": "error", **options}
    return read_prompts(load_rows(str(file)), tokenizer, judgeable=Judge().check, **options)


class Answers:
    """Answers prompt by prompt as a table says, by what the prompt asks for; keeps what it was asked.

    Args:
        reason: why a response ended, or a function of its text that says so.
    """

    def __init__(self, tokenizer, table, reason="stop"):
        self.tokenizer, self.table, self.reason, self.asked = tokenizer, table, reason, []

    def generate(self, prompts, sampling, version, numbers=None, done=None):
        return self.attempt(prompts, sampling, version, numbers, done)

    def attempt(self, prompts, sampling, version, numbers=None, done=None):
        self.asked.append((list(numbers or []), sampling, version))
        answers = []
        for index, prompt in enumerate(prompts):
            number = int(self.tokenizer.decode(prompt).split("Say ")[1].split(".")[0])
            texts = self.table(number)[: sampling.samples]
            group = [self._response(prompt, text, version) for text in texts]
            answers.append(group)
            done(index, group)
        return answers

    def _response(self, prompt, text, version):
        ids = self.tokenizer.encode(text)
        reason = self.reason(text) if callable(self.reason) else self.reason
        return Response.of_one_turn(list(prompt), ids, [-1.0] * len(ids), [version] * len(ids), reason)


def scheduler_of(tmp_path, tokenizer, judge, table, count=6, reason="stop", **values):
    prompts = prompts_of(tmp_path, [row(n) for n in range(count)], tokenizer)
    answers = Answers(tokenizer, table, reason)
    settings = settings_of(**values)
    return Scheduler(prompts, answers, judge, ESTIMATORS[settings.policy.advantages], settings, ENDS), answers


def mixed(number):
    return [f"It is {number}.", "It is 99.", "No idea", f"{number}"]


def test_groups_with_their_rewards_and_figures(tmp_path, tokenizer, rewards):
    scheduler, answers = scheduler_of(tmp_path, tokenizer, rewards, mixed)
    step = scheduler.next(version=0)
    assert [group.place for group in step.groups] == [0, 1] and step.left_out == [] and step.rounds == 1
    for group in step.groups:
        assert [one.reward for one in group.judged] == [10.0, 0.0, 0.0, 10.0]
        assert [one.solved for one in group.judged] == [True, False, False, True]
        assert sum(group.advantages.advantages) == pytest.approx(0, abs=1e-9)
    figures = step.figures()
    assert (figures["reward"], figures["solve_rate"], figures["responses"], figures["truncated"]) == (5.0, 0.5, 8, 0.0)
    ((numbers, sampling, version),) = answers.asked
    assert numbers == [0, 1] and version == 0 and (sampling.samples, sampling.seed, sampling.stop_ids) == (4, 123, ENDS)


def test_a_control_deals_rewards_out_at_random(tmp_path, tokenizer, rewards):
    """The same rewards in each group, of other responses; no response keeps its own more often than chance has it."""
    control = {"rewards": {"scale": 10.0, "workers": 1, "shuffle": True}, "train": {"prompts": 99}}
    scheduler, _ = scheduler_of(tmp_path, tokenizer, rewards, mixed, count=99, **control)
    again, _ = scheduler_of(tmp_path, tokenizer, rewards, mixed, count=99, **control)
    groups = scheduler.next(version=0).groups
    dealt = [list(group.advantages.rewards) for group in groups]
    assert all(sorted(rewards) == [0.0, 0.0, 10.0, 10.0] for rewards in dealt)
    assert all([one.solved for one in group.judged] == [True, False, False, True] for group in groups)
    for at in range(4):
        assert 0.35 < sum(rewards[at] for rewards in dealt) / 990 < 0.65
    assert dealt == [list(group.advantages.rewards) for group in again.next(version=0).groups]


def test_a_control_deals_out_penalties_for_length_too(tmp_path, tokenizer, rewards):
    """One response of each group is cut off, always the same: what it gets says nothing of that."""

    def cut(text):
        return "length" if text == "No idea" else "stop"

    control = {"rewards": {"scale": 10.0, "workers": 1, "shuffle": True}, "train": {"prompts": 99}}
    scheduler, _ = scheduler_of(tmp_path, tokenizer, rewards, mixed, count=99, reason=cut, **control)
    groups = scheduler.next(version=0).groups
    assert len(groups) == 99
    for group in groups:
        given = group.advantages.rewards
        assert sorted(given) == [-10.0, 0.0, 10.0, 10.0]
        assert [one.reward for one in group.judged] == [10.0, 0.0, 0.0, 10.0]  # what was earned, whoever gets it
        assert group.judged[2].response.finish_reason == "length" and group.judged[2].verdict.score == 0.0
    for at in range(4):
        penalised = [group.advantages.rewards[at] == -10.0 for group in groups]
        assert 0.1 < sum(penalised) / 99 < 0.4
        assert abs(sum(group.advantages.advantages[at] for group in groups) / 99) < 0.3  # of a deviation that is about 1


def test_a_control_trains_no_response_that_is_masked(tmp_path, tokenizer, rewards):
    def cut(text):
        return "length" if text == "No idea" else "stop"

    control = {"rewards": {"scale": 10.0, "workers": 1, "shuffle": True}, "policy": {"overlong": "mask"}}
    scheduler, _ = scheduler_of(tmp_path, tokenizer, rewards, mixed, reason=cut, **control)
    for group in scheduler.next(version=0).groups:
        assert group.advantages.trained == (True, True, False, True)
        assert sorted(group.advantages.rewards) == [0.0, 0.0, 10.0, 10.0]


def test_equal_groups_are_left_out_and_others_drawn(tmp_path, tokenizer, rewards):
    def table(number):
        return ["No idea"] * 4 if number in (2, 3, 4) else mixed(number)

    in_order = {"train": "d", "shuffle": False}
    scheduler, answers = scheduler_of(tmp_path, tokenizer, rewards, table, data=in_order, train={"prompts": 4, "refills": 3})
    step = scheduler.next(version=0)
    assert [asked[0] for asked in answers.asked] == [[0, 1, 2, 3], [4, 5], [6]]
    assert [group.place for group in step.groups] == [0, 1, 5, 6]
    assert [group.place for group in step.left_out] == [2, 3, 4]
    figures = step.figures()
    assert (figures["groups"], figures["equal_groups"], figures["refills"]) == (4, 3, 2)
    assert figures["solve_rate"] == pytest.approx(8 / 28)  # of all that were asked


def test_the_estimator_decides_what_is_worth_training(tmp_path, tokenizer, rewards):
    """One that is not of groups, such as a value model's: a response is worth training though all rewards are equal."""
    asked = []

    def estimator(rewards, masked):
        asked.append((list(rewards), list(masked)))
        return GroupAdvantages((0.5,) * len(rewards), (True,) * len(rewards), tuple(rewards))

    settings = settings_of(policy={"overlong": "mask"})
    prompts = prompts_of(tmp_path, [row(n) for n in range(4)], tokenizer)
    answers = Answers(tokenizer, lambda n: ["No idea"] * 4, "length")
    step = Scheduler(prompts, answers, rewards, estimator, settings, ENDS).next(version=0)
    assert len(step.groups) == 2 and step.left_out == [] and step.rounds == 1
    assert asked == [([0.0] * 4, [True] * 4)] * 2
    assert all(group.advantages.advantages == (0.5,) * 4 for group in step.groups)


def test_refills_end(tmp_path, tokenizer, rewards):
    scheduler, answers = scheduler_of(tmp_path, tokenizer, rewards, lambda n: ["No idea"] * 4)
    step = scheduler.next(version=0)
    assert step.groups == [] and len(answers.asked) == 3 and len(step.left_out) == 6


def test_without_the_filter_equal_groups_stay(tmp_path, tokenizer, rewards):
    scheduler, answers = scheduler_of(tmp_path, tokenizer, rewards, lambda n: ["No idea"] * 4, train={"filter_equal": False})
    step = scheduler.next(version=0)
    assert len(step.groups) == 2 and len(answers.asked) == 1
    assert all(not any(group.advantages.advantages) for group in step.groups)


def test_a_failed_verifier_takes_its_sample_out_and_is_counted(tmp_path, tokenizer):
    module = tmp_path / "own_verifier.py"
    module.write_text(
        "def judge(response, ground_truth, messages=None):\n"
        "    if 'No idea' in response:\n        raise RuntimeError('boom')\n"
        "    return 1.0 if ground_truth in response else 0.0\n"
    )
    import sys

    sys.path.insert(0, str(tmp_path))
    try:
        settings = settings_of(rewards={"scale": 1.0, "workers": 1, "custom": {"gsm8k": "own_verifier:judge"}})
        with Rewards(settings.rewards, ["gsm8k"], tokenizer) as own:
            prompts = prompts_of(tmp_path, [row(n + 5) for n in range(4)], tokenizer)
            step = Scheduler(prompts, Answers(tokenizer, mixed), own, ESTIMATORS["standardised"], settings, ENDS).next(version=0)
    finally:
        sys.path.remove(str(tmp_path))
    for group in step.groups:
        assert group.judged[2].reward is None and "boom" in group.judged[2].verdict.error
        assert group.advantages.trained == (True, True, False, True) and group.advantages.advantages[2] == 0.0
    assert step.figures()["verifier_failures"] == 2
    assert step.figures()["solve_rate"] == pytest.approx(2 / 3)
    journal.write_rollouts(tmp_path, 1, step, {(step.groups[0].place, 0): (0.25, 0.5)})
    lines = [json.loads(line) for line in journal.rollouts_file(tmp_path, 1).read_text().splitlines()]
    assert len(lines) == 8 and lines[0]["logp_difference_max"] == 0.5 and "boom" in lines[2]["error"]
    assert lines[2]["reward"] is None and not lines[2]["trained"] and lines[0]["trained"] and lines[0]["version"] == 0


def test_a_score_of_the_reward_model_that_is_no_number_takes_its_sample_out(tmp_path, tokenizer):
    """NaN and infinity would make loss and gradient of the whole batch the same; so would a reward beyond float32."""
    scores = {"It is 0.": math.nan, "No idea": math.inf, "0": 1e38, "It is 99.": 0.5}
    own = {"scale": 1.0, "workers": 1, "model": "m", "model_weight": 10.0}
    settings = settings_of(rewards=own, train={"prompts": 1, "filter_equal": False})

    def model(responses):
        return [scores[tokenizer.decode(one.last_answer)] for one in responses]

    with Rewards(settings.rewards, ["gsm8k"], tokenizer, model) as own:
        prompts = prompts_of(tmp_path, [row(0)], tokenizer)
        step = Scheduler(prompts, Answers(tokenizer, mixed), own, ESTIMATORS["centred"], settings, ENDS).next(version=0)
    (group,) = step.groups
    assert [one.reward for one in group.judged] == [None, 5.0, None, None] and step.figures()["verifier_failures"] == 3
    assert ["the reward model's score is nan" in (one.verdict.error or "") for one in group.judged] == [True, False, False, False]
    assert group.judged[0].verdict.parts == {"gsm8k": 1.0} and "the reward is 1e+39" in group.judged[3].verdict.error
    journal.write_rollouts(tmp_path, 1, step, {(0, 0): (math.nan, math.inf)})
    lines = [json.loads(line, parse_constant=pytest.fail) for line in journal.rollouts_file(tmp_path, 1).read_text().splitlines()]
    assert lines[0]["reward"] is None and lines[0]["logp_difference_mean"] == "NaN" and "model_score" not in lines[0]


def test_cut_off_responses_are_penalised_after_grouping(tmp_path, tokenizer, rewards):
    scheduler, _ = scheduler_of(tmp_path, tokenizer, rewards, mixed, reason="length", train={"filter_equal": False})
    step = scheduler.next(version=0)
    assert step.figures()["reward"] == -10.0 and step.figures()["truncated"] == 1.0
    journal.write_rollouts(tmp_path, 1, step, {})
    lines = [json.loads(line) for line in journal.rollouts_file(tmp_path, 1).read_text().splitlines()]
    assert [line["reward"] for line in lines[:4]] == [-10.0] * 4
    assert [line["verdict_reward"] for line in lines[:4]] == [10.0, 0.0, 0.0, 10.0]


def test_a_restored_scheduler_goes_on_where_the_other_was(tmp_path, tokenizer, rewards):
    scheduler, answers = scheduler_of(tmp_path, tokenizer, rewards, mixed)
    scheduler.next(version=0)
    state = json.loads(json.dumps(scheduler.state))
    scheduler.next(version=1)
    again, others = scheduler_of(tmp_path, tokenizer, rewards, mixed)
    again.restore(state, step=1)
    again.next(version=1)
    assert others.asked == answers.asked[1:]


def test_greedy_evaluation_of_held_out_prompts(tmp_path, tokenizer, rewards):
    scheduler, answers = scheduler_of(tmp_path, tokenizer, rewards, lambda n: [f"It is {n % 2}."])
    evaluation = scheduler.evaluate(prompts_of(tmp_path, [row(n) for n in range(5)], tokenizer), version=7)
    assert evaluation.figures()["heldout_solve_rate"] == pytest.approx(2 / 5)
    ((_, sampling, version),) = answers.asked
    assert (sampling.temperature, sampling.samples, sampling.stop_ids, version) == (0.0, 1, ENDS, 7)


def test_every_epoch_asks_each_prompt_once_in_an_order_of_its_own():
    stream = PromptStream(10, seed=4, shuffle=True)
    first, second = [stream[n] for n in range(10)], [stream[n] for n in range(10, 20)]
    assert sorted(first) == sorted(second) == list(range(10)) and first != second
    assert [PromptStream(10, seed=4, shuffle=True)[n] for n in range(20)] == first + second
    assert [PromptStream(3, 0, shuffle=False)[n] for n in range(7)] == [0, 1, 2, 0, 1, 2, 0]


BAD = [
    ("{", "line 2: not valid JSON"),
    ({**row(1), "dataset": "gsm9k"}, "line 2: unknown verifier 'gsm9k'; did you mean 'gsm8k'?"),
    ({**row(1), "ground_truth": None}, "line 2: ground_truth for 'gsm8k': not given"),
    ({"ground_truth": "1", "dataset": "gsm8k"}, "line 2: has ground_truth, dataset; expected messages, the prompt as a list"),
    ({"text": "Say 1.", "messages": None}, "line 2: has text; expected messages, the prompt as a list"),
    ({**row(1), "messages": [{"role": "assistant", "content": "1"}]}, "line 2: its last message is the assistant's"),
]


@pytest.mark.parametrize(("bad", "message"), BAD)
def test_bad_rows_are_named_or_left_out(tmp_path, tokenizer, bad, message):
    with pytest.raises(UserError) as caught:
        prompts_of(tmp_path, [row(0), bad], tokenizer)
    assert message in caught.value.problems[0]
    assert 'data.malformed = "reject"' in caught.value.problems[-1]
    kept = prompts_of(tmp_path, [row(0), bad], tokenizer, malformed="reject")
    assert len(kept) == 1 and kept.rejects[0]["kind"] == "malformed"


def test_long_prompts_are_left_out_and_listed(tmp_path, tokenizer):
    long = {**row(1), "messages": [{"role": "user", "content": "word " * 200}]}
    kept = prompts_of(tmp_path, [row(0), long], tokenizer)
    assert len(kept) == 1 and kept.rejects[0]["kind"] == "too_long" and "data.max_prompt = 64" in kept.rejects[0]["reason"]
    with pytest.raises(UserError, match="none of the 1 rows can be used"):
        prompts_of(tmp_path, [long], tokenizer)
