"""HumanEval and MBPP: rows of their public formats, what is asked, what the program of a response is, and what it earns."""

from __future__ import annotations

import gzip
import json

import pytest

from tulu_mega.errors import UserError
from tulu_mega.evaluation import rows
from tulu_mega.evaluation.judging import check, judge
from tulu_mega.evaluation.programs import continued, fenced
from tulu_mega.evaluation.settings import TaskSettings
from tulu_mega.evaluation.tasks import TASKS, humaneval, mbpp
from tulu_mega.rewards.verifiers.python_code import program_of

TOTAL = {
    "task_id": "HumanEval/0",
    "prompt": 'from typing import List\n\n\ndef total(numbers: List[int]) -> int:\n    """ Sum.\n    >>> total([1])\n    """\n',
    "entry_point": "total",
    "canonical_solution": "    return sum(numbers)\n",
    "test": "\n\nMETADATA = {}\n\n\ndef check(candidate):\n    assert candidate([1, 2]) == 3\n    assert candidate([]) == 0\n",
}
HELPED = {
    **TOTAL,
    "prompt": 'def twice(x: int):\n    """ Doubles. """\n    return 2 * x\n\n\ndef half(x: int):\n    """ Undoes twice. """\n',
    "entry_point": "half",
    "test": "def check(candidate):\n    for x in range(5):\n        assert candidate(twice(x)) == x\n",
}
MBPP_ROW = {
    "task_id": 1,
    "text": "Write a function to add.",
    "code": "import math\r\ndef add(a, b):\r\n    return a + b",
    "test_list": ["assert add(1, 2) == 3", "assert add(0, 0) == 0", "assert math.isclose(add(.1, .2), .3)"],
    "test_setup_code": "import math",
}


def test_programs_earn_a_point_where_all_tests_pass():
    """As in the paper: a response is what stands between the prompt and a stop sequence."""
    solved = TOTAL["canonical_solution"]
    cases = [
        (TOTAL, solved, 1),
        (TOTAL, f"{solved}```\nIt sums.", 1),
        (TOTAL, f"{solved}\nprint(total(None))", 1),
        (TOTAL, "    s = 0\n    for n in numbers:\n        s += n\n    return s\n\ndef broken(:", 1),
        (TOTAL, "    return 3\n", 0),
        (TOTAL, "    pass\n", 0),
        (TOTAL, "", 0),
        (TOTAL, "Sure!", 0),
        (HELPED, "    return x // 2\n", 1),
        (HELPED, "    return x\n", 0),
    ]
    answers = {"def add(a, b):\n    return a + b\n```\nDone.": 1, "def add(a, b):\n    return 3 if a else 0\n": 0, "": 0}
    cases += [(MBPP_ROW, response, right) for response, right in answers.items()]  # all assertions or none
    problems = [(mbpp if row is MBPP_ROW else humaneval).read(row) for row, _, _ in cases]
    check(TASKS["humaneval"], problems, {})
    # together: a pool of verifiers takes a second to start, and the tasks' verifier is the same
    judged = judge(TASKS["humaneval"], problems, [[response] for _, response, _ in cases], {})
    assert [one.values["pass@1"] for (one,) in judged] == [(float(right), 1) for _, _, right in cases]


def test_what_is_asked_and_how_answers_begin(tmp_path):
    file = tmp_path / "HumanEval.jsonl.gz"
    file.write_bytes(gzip.compress((json.dumps(TOTAL) + "\n" + json.dumps(HELPED) + "\n").encode()))
    found = rows.problems(TASKS["humaneval"], TaskSettings(data=str(file)))
    assert [problem.row for problem in found] == [0, 1]
    code = f"```python\n{TOTAL['prompt']}\n"
    assert found[0].begin == f"Here is the completed function:\n{code}"
    assert found[0].messages[0]["content"].endswith(f"passes the tests:\n{code}```\n")
    problem, shot = mbpp.read({**MBPP_ROW, "text": None, "prompt": "Add."}), mbpp.shot(MBPP_ROW)
    assert problem.messages[0]["content"].splitlines()[1:3] == ["Add.", "Your code should pass these tests:"]
    assert problem.begin == "```python\n" and shot.answer == "```python\nimport math\ndef add(a, b):\n    return a + b\n```"
    assert mbpp.read({**MBPP_ROW, "test_setup_code": "", "test_imports": ["import math"]}).answer == problem.answer


@pytest.mark.parametrize("row", mbpp.TASK.own_shots)
def test_worked_examples_hold_their_assertions(row):
    tests = row.question.partition("pass these tests:\n")[2]
    exec(program_of(row.answer) + "\n" + tests, {})


@pytest.mark.parametrize(
    ("task", "row", "told"),
    [
        ("humaneval", {"prompt": "def f():", "test": "a"}, "entry_point is missing"),
        ("humaneval", {**TOTAL, "entry_point": "a; b"}, "expected the name of a function"),
        ("mbpp", {**MBPP_ROW, "test_list": "assert f()"}, "test_list is no list of texts"),
        ("mbpp", {**MBPP_ROW, "test_setup_code": 3}, "test_setup_code"),
    ],
)
def test_rows_of_another_form_are_refused(tmp_path, task, row, told):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(row))
    with pytest.raises(UserError, match=f"{told}.*{TASKS[task].title} expects"):
        rows.problems(TASKS[task], TaskSettings(data=str(file)))
    with pytest.raises(UserError, match="is not Python"):
        check(TASKS["humaneval"], [humaneval.read({**TOTAL, "test": "def check(:"})], {})


def test_the_verifier_finds_a_program_whatever_is_in_it():
    for program in ("x = 1\n", 'x = """\n```\ny\n```\n"""\n', "# ````python\n"):
        assert program_of(fenced(program)) == program
    assert continued("a", "b\ndef c```d", ("\ndef",)) == "ab" and continued("a", "b```d\ndef", ("\ndef",)) == "ab"
