"""What of a response counts as its answer, and arguments of instructions that cannot be used."""

import json

import pytest

from tulu_mega.evaluation import rows
from tulu_mega.evaluation.settings import TaskSettings
from tulu_mega.evaluation.tasks import TASKS


@pytest.mark.parametrize(
    ("response", "target", "right"),
    [
        ("The answer is (B).", "(B)", 1),
        ("The answer is (B), the second.", "(B)", 1),
        ("The answer is option (B).", "(B)", 1),
        ("The answer is\n(B)", "(B)", 1),
        (r"The answer is $\boxed{\text{B}}$.", "(B)", 1),
        ("The answer is (B), not (A).", "(B)", 1),
        ("The answer is (B) because (A) and (C) are wrong", "(B)", 1),
        ("The answer is (A) or (B).", "(A)", 0),
        ("The answer is (A) and (B).", "(A)", 0),
        ("The answer is (A), (B)", "(A)", 0),
        ("The answer is A/B", "(A)", 0),
        ("The answer is either (A) or (B)", "(A)", 0),
        ("The answer is (A) the first or (B) the second", "(A)", 0),
        ("The answer is A dog", "(A)", 0),
        ("the answer is \u221224", "-24", 1),
        ("The answer is No, because it is not.", "No", 1),
        ("The answer is yes or no", "Yes", 0),
        ("The answer is ] } )", "] } )", 1),
        ("<think>The answer is (B)</think>I do not know", "(B)", 0),
        ("<think>The answer is (A)</think>The answer is (B)", "(B)", 1),
        ("<think>The answer is (B)", "(B)", 0),
    ],
)
def test_the_answer_to_a_task_of_big_bench_hard(response, target, right):
    assert TASKS["bbh"].judge(response, target) == {"exact_match": (float(right), 1)}


def test_the_published_prompts_say_what_the_task_is(tmp_path):
    text = "canary\n-----\nSay yes.\nAlways.\n\nQ: a?\nA: Let's think step by step.\nSo the answer is yes.\n\nQ: b?\nA: yes\n"
    (tmp_path / "easy.txt").write_text(text)
    first, second = rows.shots(TASKS["bbh"], TaskSettings(shots_from=str(tmp_path)))
    assert (
        first.question == "Say yes.\nAlways.\n\nQ: a?\nA: Let's think step by step." and first.answer == "So the answer is yes."
    )
    assert second.question == "Q: b?\nA: Let's think step by step."


def test_instructions_are_not_looked_for_in_the_reasoning():
    judge = TASKS["ifeval"].judge
    assert judge("<think>a, b, c</think>\nok then", [["punctuation:no_comma", {}]])["prompt_strict"] == (1.0, 1)
    assert judge("<think>no commas", [["punctuation:no_comma", {}]])["prompt_loose"] == (0.0, 1)
    assert judge("123", [["language:response_language", {"language": "te"}]])["prompt_strict"] == (1.0, 1)  # as published


@pytest.mark.parametrize(
    ("name", "arguments", "says"),
    [
        ("length_constraints:number_words", {"num_words": 3, "relation": "at most"}, "'less than' or 'at least'"),
        ("length_constraints:number_words", {"num_words": "3", "relation": "at least"}, "a count"),
        ("length_constraints:number_words", {"num_words": float("inf"), "relation": "at least"}, "a count"),
        ("length_constraints:number_words", {"num_words": 3}, "lacks relation"),
        ("keywords:existence", {"keywords": "cat"}, "a list of words"),
        ("keywords:letter_frequency", {"letter": "ab", "let_frequency": 1, "let_relation": "at least"}, "a single letter"),
        ("language:response_language", {"language": "German"}, "one of the languages"),
        ("length_constraints:nth_paragraph_first_word", {"num_paragraphs": 2, "nth_paragraph": 0, "first_word": "b"}, "from 1"),
        ("punctuation:no_comma", "{}", "expected an object or null"),
        ("punctuation:no_comma", [1], "expected an object or null"),
        ("punctuation:no_comma", 5, "expected an object or null"),
    ],
)
def test_arguments_that_cannot_be_used_are_refused(name, arguments, says):
    with pytest.raises(ValueError, match=says):
        TASKS["ifeval"].read({"prompt": "x", "instruction_id_list": [name], "kwargs": [arguments]})


def test_counts_of_tables_with_gaps_are_counts():
    row = {"prompt": "x", "instruction_id_list": ["keywords:frequency"]}
    problem = TASKS["ifeval"].read(
        {**row, "kwargs": [{"keyword": "a", "frequency": 2.0, "relation": "at least", "letter": None}]}
    )
    assert json.dumps(problem.answer) == '[["keywords:frequency", {"keyword": "a", "frequency": 2, "relation": "at least"}]]'


@pytest.mark.parametrize(
    ("row", "answer"),
    [
        ({"answer": 5, "solution": r"Hence \boxed{4} apples and one more."}, "5"),
        ({"answer": 204}, "204"),
        ({"answer": float("nan"), "solution": r"\boxed{4}"}, "4"),
        ({"answer": None, "solution": r"\boxed{4}"}, "4"),
    ],
)
def test_an_answer_of_math_may_be_a_number(row, answer):
    assert TASKS["math"].read({"problem": "q", **row}).answer == answer
