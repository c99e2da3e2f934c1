"""The quickstart's task: answers are right, the split is clean, the same seed gives the same text."""

import json
import re
from collections import Counter
from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tulu_mega.errors import UserError
from tulu_mega.quickstart.task import (
    Mixture,
    Problem,
    demonstrations,
    extract_answer,
    is_correct,
    pairs,
    problems,
    prompt_row,
    write_jsonl,
)


def take(stream, count):
    return list(islice(stream, count))


def test_values_follow_the_steps():
    assert Problem("", 5, (("x", 4), ("-", 3))).values == [5, 20, 17]
    assert Problem("", 12, (("+", 5),)).answer == 17


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_a_question_tells_the_numbers_in_order_and_no_count_is_negative(split):
    for problem in take(problems(split, seed=3), 300):
        told = [int(number) for number in re.findall(r"\d+", problem.question)]
        used = [problem.start, *(number for _, number in problem.steps)]
        if problem.steps[0][0] == "x":  # "3 bags of 4 pens": 4 x 3
            used[:2] = used[1::-1]
        assert told == used
        assert min(problem.values) >= 0
        assert "{" not in problem.question


@given(st.integers(), st.integers())
def test_train_and_heldout_are_disjoint_whatever_the_seeds(one, other):
    train = {problem.question for problem in islice(problems("train", one), 200)}
    assert not train & {problem.question for problem in islice(problems("heldout", other), 200)}


def test_the_same_seed_gives_the_same_rows_and_another_seed_others():
    assert take(demonstrations(7), 50) == take(demonstrations(7), 50)
    assert take(demonstrations(7), 50) != take(demonstrations(8), 50)


def test_the_mixture_sets_the_shares():
    rows = take(demonstrations(0, Mixture(two_step=0.6, terse=0.7, careless=0.2, guessed=0.3)), 4000)
    kinds = Counter()
    for row in rows:
        question, response = (message["content"] for message in row["messages"])
        long = len(re.findall(r"\d+", question)) == 3
        right = is_correct(response, row["ground_truth"])
        if response.startswith("The"):
            kinds[long, "terse"] += 1
            kinds[long, "guessed"] += not right
            assert abs(int(extract_answer(response)) - int(row["ground_truth"])) <= 3
        else:
            kinds[long, "right" if right else "wrong"] += 1
    long = sum(kinds[True, style] for style in ("terse", "right", "wrong"))
    assert abs(long / 4000 - 0.6) < 0.03
    assert abs(kinds[True, "terse"] / long - 0.7) < 0.04
    assert abs(kinds[True, "guessed"] / kinds[True, "terse"] - 0.3) < 0.04
    assert kinds[False, "terse"] == 0
    assert abs(kinds[False, "wrong"] / (4000 - long) - 0.2) < 0.04


def test_worked_demonstrations_are_consistent_but_for_one_slip():
    for row in take(demonstrations(1, Mixture(terse=0.0, careless=0.5)), 300):
        response = row["messages"][1]["content"]
        steps = re.findall(r"(\d+)([-+x])(\d+)=(\d+)\.", response)
        right = [{"+": int(a) + int(b), "-": int(a) - int(b), "x": int(a) * int(b)}[op] == int(c) for a, op, b, c in steps]
        assert right.count(False) == (0 if is_correct(response, row["ground_truth"]) else 1)
        assert response.endswith(f"={steps[-1][3]}. The answer is {steps[-1][3]}.")


def test_rows_carry_what_later_stages_read():
    row = prompt_row(Problem("How many?", 2, (("+", 1),)))
    assert row == {"messages": [{"role": "user", "content": "How many?"}], "ground_truth": "3", "dataset": "gsm8k"}


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("The answer is 42.", "42"),
        ("2+3=5. 5-1=4. The answer is 1,204.", "1204"),
        ("It is 3.50, I think", "3.50"),
        ("9-12=-3", "-3"),
        ("5-3", "3"),
        ("none", None),
        ("", None),
    ],
)
def test_the_last_number_is_the_answer(text, answer):
    assert extract_answer(text) == answer


def test_equality_is_of_digits():
    assert is_correct("so 7.", "7")
    assert not is_correct("so 17.", "7")
    assert not is_correct("seven", "7")


def test_jsonl_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "data/train.jsonl"
    write_jsonl([{"a": 1}, {"b": "é"}], path)
    assert [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] == [{"a": 1}, {"b": "é"}]

    def failing():
        yield {"a": 2}
        raise RuntimeError("half way")

    with pytest.raises(RuntimeError):
        write_jsonl(failing(), path)
    assert [file.name for file in path.parent.iterdir()] == ["train.jsonl"]
    assert json.loads(path.read_text().splitlines()[0]) == {"a": 1}
    with pytest.raises(UserError, match=r"train\.jsonl.*cannot be written"):
        write_jsonl([], path / "train.jsonl")


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_of_a_pair_the_chosen_answer_is_right_and_the_rejected_one_wrong_in_the_same_style(split):
    questions = set()
    styles = Counter()
    for row in take(pairs(split, seed=1), 400):
        prompt, chosen, rejected = row["chosen"][0], row["chosen"][1]["content"], row["rejected"][1]["content"]
        assert row["rejected"][0] == prompt and len(row["chosen"]) == len(row["rejected"]) == 2
        truth = extract_answer(chosen)
        assert not is_correct(rejected, truth) and int(extract_answer(rejected)) >= 0
        assert (chosen.count("=") > 0) == (rejected.count("=") > 0)  # style tells nothing
        styles[rejected.count("=") > 0] += 1
        questions.add(prompt["content"])
    assert 0.4 < styles[True] / 400 < 0.6
    other = "heldout" if split == "train" else "train"
    assert not questions & {problem.question for problem in islice(problems(other, 1), 400)}


def test_chosen_answers_solve_their_problems():
    rows = take(pairs("train", seed=2), 50)
    for problem, row in zip(problems("train", "2 pairs", two_step=0.8), rows, strict=False):
        assert row["chosen"][0]["content"] == problem.question
        assert is_correct(row["chosen"][1]["content"], str(problem.answer))
