"""The tests of a row of `python_code`."""

from __future__ import annotations

import json
from typing import Any


def tests_of(ground_truth: Any) -> list[dict[str, str]]:
    """The tests of a row.

    Raises:
        ValueError: no list of tests.
    """
    tests = ground_truth
    if isinstance(tests, str):
        try:
            tests = json.loads(tests)
        except (ValueError, RecursionError):
            tests = [tests]  # one statement
    if not isinstance(tests, list) or not tests:
        raise ValueError(f"expected a list of tests, got {str(ground_truth)[:80]!r}")
    return [_test(test, number) for number, test in enumerate(tests, 1)]


def _test(test: Any, number: int) -> dict[str, str]:
    if isinstance(test, str) and test.strip():
        try:
            compile(test, "<test>", "exec")
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:  # the last two: nested too deeply
            raise ValueError(f"test {number} is not Python: {error or type(error).__name__}: {test[:80]!r}") from None
        return {"statement": test}
    if isinstance(test, dict) and test.keys() == {"input", "output"} and all(isinstance(text, str) for text in test.values()):
        return test
    raise ValueError(f"test {number}: expected a statement or an object with texts 'input' and 'output', got {str(test)[:80]!r}")
