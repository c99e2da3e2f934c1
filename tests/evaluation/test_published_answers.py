"""Published answers with published verdicts: BIG-Bench Hard's of code-davinci-002, GSM8K's with OpenAI's own labels."""

import json
from collections import defaultdict

import pytest

from tests.lib.real_data import real_data
from tulu_mega.evaluation import rows
from tulu_mega.evaluation.settings import TaskSettings
from tulu_mega.evaluation.tasks import TASKS, bbh
from tulu_mega.rewards.verifiers.gsm8k import Gsm8k
from tulu_mega.rewards.verifiers.last_number import LastNumber

pytestmark = pytest.mark.acceptance


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def paper(prediction):
    """What the paper compared: the text behind the last "the answer is ", without its full stop."""
    return prediction.split("the answer is ")[-1].strip().removesuffix(".")


def test_big_bench_hards_published_answers_score_as_in_the_paper():
    ours, published = defaultdict(list), defaultdict(list)
    for row in lines(real_data("bbh_codex_outputs.jsonl")):
        ours[row["task"]].append(bbh.judge(row["prediction"], row["target"])["exact_match"][0])
        published[row["task"]].append(float(paper(row["prediction"]) == row["target"]))
    assert len(ours) == 27 and sum(map(len, ours.values())) == 6511
    assert ours == published
    shares = {task: round(100 * sum(ours[task]) / len(ours[task]), 1) for task in ("snarks", "ruin_names", "hyperbaton")}
    assert shares == {"snarks": 59.6, "ruin_names": 68.4, "hyperbaton": 66.4}  # the paper's table


def test_gsm8ks_labelled_solutions_are_judged_as_labelled():
    """Every label by `last_number`; by `gsm8k` every one but where the sign of an integer decides, as Tulu 3 read it."""
    differ, count = defaultdict(list), 0
    for row in lines(real_data("gsm8k_model_solutions.jsonl")):
        truth = row["ground_truth"].rpartition("A: ")[2]
        for solution in (value for value in row.values() if isinstance(value, dict)):
            count += 1
            for verifier in (Gsm8k(), LastNumber()):
                if bool(verifier(solution["solution"], truth).score) != solution["is_correct"]:
                    differ[type(verifier).__name__].append((truth, solution["solution"].rpartition("A: ")[2]))
    assert count == 5276
    assert set(differ) == {"Gsm8k"} and len(differ["Gsm8k"]) == 10
    assert all(said.startswith("-") and said.lstrip("-") == truth.lstrip("-") for truth, said in differ["Gsm8k"])


def test_the_published_prompts_of_big_bench_hard_are_read_with_what_the_task_is():
    shots = rows.shots(TASKS["bbh"], TaskSettings(shots_from=str(real_data("bbh/cot-prompts"))))
    assert len(shots) == 27 * 3 and len({shot.group for shot in shots}) == 27
    for task in {shot.group for shot in shots}:
        first, *others = [shot.question for shot in shots if shot.group == task]
        published = real_data(f"bbh/cot-prompts/{task}.txt").read_text(encoding="utf-8").partition("\n-----\n")[2]
        assert published.startswith(first.partition("\nA:")[0]), task
        assert all(question.startswith("Q: ") for question in others)
