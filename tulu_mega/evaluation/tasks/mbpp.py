"""MBPP (Austin et al., arXiv 2108.07732): small programs from a sentence and three assertions, which all must hold.

Asked as lm-evaluation-harness asks `mbpp_instruct`: the assertions in the user's message, and an open fence as the beginning of
the answer.
"""

from __future__ import annotations

from functools import partial

from tulu_mega.evaluation.programs import FENCE, VERIFIER, continued, fenced
from tulu_mega.evaluation.task import Problem, Row, Shot, Task, asked, text_field


def _question(text: str, tests: list[str]) -> str:
    lines = ("You are an expert Python programmer, and here is your task:", text.strip(), "Your code should pass these tests:")
    return "\n".join([*lines, *tests])


def _parts(row: Row) -> tuple[str, list[str], str]:
    """The task in words (`prompt` of the sanitized set), its assertions, and what they need before them."""
    text = text_field(row, "text" if row.get("text") is not None else "prompt")
    tests = row.get("test_list")
    if not isinstance(tests, list) or not tests or not all(isinstance(test, str) for test in tests):
        raise ValueError("test_list is no list of texts; expected assertions")
    setup = row.get("test_setup_code") or row.get("test_imports") or ""
    if isinstance(setup, list) and all(isinstance(line, str) for line in setup):
        setup = "\n".join(setup)
    if not isinstance(setup, str):
        raise ValueError("test_setup_code (or test_imports) is no text; expected statements that run before the tests")
    return text, tests, setup


def read(row: Row) -> Problem:
    """
    Raises:
        ValueError: a row of another form.
    """
    text, tests, setup = _parts(row)
    statements = "\n".join([setup, *tests] if setup else tests)
    return Problem(
        asked(_question(text, tests)), [statements], verifier=VERIFIER, begin=f"{FENCE}python\n", program=partial(_program, setup)
    )


def _program(setup: str, response: str) -> str:
    return fenced(continued(f"{setup}\n" if setup else "", response))


def shot(row: Row) -> Shot:
    """A demonstration from a row with its `code`.

    Raises:
        ValueError: a row of another form.
    """
    text, tests, _ = _parts(row)
    code = "\n".join(text_field(row, "code").splitlines()).strip()
    return Shot(_question(text, tests), f"{FENCE}python\n{code}\n{FENCE}")


_OWN = (
    ("Write a function to count the even numbers of a list.",
     ["assert count_even([1, 2, 4]) == 2", "assert count_even([]) == 0", "assert count_even([3, 5]) == 0"],
     "def count_even(numbers):\n    return sum(number % 2 == 0 for number in numbers)"),
    ("Write a function to join words by a hyphen, in capitals.",
     ['assert shout(["a", "b"]) == "A-B"', 'assert shout(["stop"]) == "STOP"', 'assert shout([]) == ""'],
     'def shout(words):\n    return "-".join(word.upper() for word in words)'),
    ("Write a function to find the second largest of the different numbers of a list, or None.",
     ["assert second([3, 1, 3]) == 1", "assert second([2, 2]) is None", "assert second([5, 7, 6]) == 6"],
     "def second(numbers):\n    different = sorted(set(numbers))\n    return different[-2] if len(different) > 1 else None"),
)  # fmt: skip

TASK = Task(
    name="mbpp",
    title="MBPP",
    fields="text (or prompt), test_list (assertions), and of worked examples code; test_setup_code or test_imports",
    hub=("google-research-datasets/mbpp:full",),
    split="test",
    read=read,
    max_tokens=512,
    metrics=("pass@1",),
    shots=3,
    shot=shot,
    own_shots=tuple(Shot(_question(text, tests), f"{FENCE}python\n{code}\n{FENCE}") for text, tests, code in _OWN),
)
