"""Programs that must pass tests."""

from __future__ import annotations

from typing import Any

from tulu_mega.json_input import read_json_text
from tulu_mega.rewards.fences import fenced_blocks
from tulu_mega.rewards.reasoning import answer_of
from tulu_mega.rewards.sandbox import DEFAULT_LIMITS, CodeLimits, require_protections, run_program
from tulu_mega.rewards.verdict import Messages, Verdict

_ORDINARY = ("", "wrong", "error")


class PythonCode:
    """The share of the tests that the reply's program passes.

    Statements are evaluated apart from the program (:func:`tulu_mega.rewards.sandbox.run_program`): calls go over to it,
    values come back. What a program does beside the point (running on, leaving, meddling with the answers) is a failed test
    and told in the verdict's ``kind``.

    The program is the last fenced block of the answer (not of its reasoning) that is marked ``python`` (or ``py``), else the
    last one without a mark (:func:`tulu_mega.rewards.fences.fenced_blocks`); without any, the reply scores 0.

    The ground truth lists the tests (or is JSON of such a list): statements that run after the program, such as
    ``"assert add(1, 2) == 3"``, or objects ``{"input": ..., "output": ...}`` for standard input and output.

    The share of passed tests is what open-instruct's code verifier (June 2025) gives; Tulu 3 itself trained on no code.
    Departs: tests run in a local sandbox and not in a web service, and there is no malus for running long.

    What the sandbox enforces is told at :func:`tulu_mega.rewards.sandbox.run_program`.
    """

    def __init__(self, limits: CodeLimits = DEFAULT_LIMITS):
        self.limits = limits
        require_protections(limits)

    def check(self, ground_truth: Any) -> None:
        _tests(ground_truth)

    def __call__(self, response: str, ground_truth: Any, *, messages: Messages | None = None) -> Verdict:
        tests = _tests(ground_truth)
        program = program_of(response)
        if program is None:
            return Verdict.of(False, "no fenced block of Python code")
        outcomes = run_program(program, tests, self.limits, _prompt(messages))
        passed = sum(outcome.passed for outcome in outcomes)
        failure = next((f"; test {i}: {outcome.detail}" for i, outcome in enumerate(outcomes, 1) if not outcome.passed), "")
        kind = next((outcome.kind for outcome in outcomes if outcome.kind not in _ORDINARY), "")
        return Verdict(passed / len(tests), f"{passed} of {len(tests)} tests passed{failure}", kind=kind)


def _prompt(messages: Messages | None) -> str:
    """What the model was asked: tests may call what it defines."""
    asked = [message.get("content") for message in messages or () if message.get("role") == "user"]
    return "\n\n".join(content for content in asked if isinstance(content, str))


def program_of(response: str) -> str | None:
    """The last block of Python in the reply's answer."""
    blocks = [(mark.lower(), code) for mark, code in fenced_blocks(answer_of(response))]
    for marks in (("python", "python3", "py"), ("",)):
        chosen = [code for mark, code in blocks if mark in marks]
        if chosen:
            return chosen[-1]
    return None


def _tests(ground_truth: Any) -> list[dict[str, str]]:
    """
    Raises:
        ValueError: no list of tests.
    """
    tests = ground_truth
    if isinstance(tests, str):
        try:
            tests = read_json_text(tests)
        except ValueError:
            tests = [tests]  # one statement
    if not isinstance(tests, list) or not tests:
        raise ValueError(f"expected a list of tests, got {str(ground_truth)[:80]!r}")
    return [_test(test, number) for number, test in enumerate(tests, 1)]


def _test(test: Any, number: int) -> dict[str, str]:
    if isinstance(test, str) and test.strip():
        try:
            compile(test, "<test>", "exec")
        except (SyntaxError, ValueError) as error:
            raise ValueError(f"test {number} is not Python: {error}: {test[:80]!r}") from None
        return {"statement": test}
    if isinstance(test, dict) and test.keys() == {"input", "output"} and all(isinstance(text, str) for text in test.values()):
        return test
    raise ValueError(f"test {number}: expected a statement or an object with texts 'input' and 'output', got {str(test)[:80]!r}")


VERIFIER = PythonCode
