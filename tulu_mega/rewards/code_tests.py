"""The tests of a row of `python_code`."""

from __future__ import annotations

import ast
from typing import Any

from tulu_mega.outside.json_input import NameTwice, read_whole_json


def tests_of(ground_truth: Any) -> list[dict[str, str]]:
    """The tests of a row.

    Raises:
        ValueError: no list of tests.
    """
    tests = ground_truth
    if isinstance(tests, str):
        try:
            tests = read_whole_json(tests)
        except NameTwice as error:
            raise ValueError(f"the tests are not valid JSON: {error}") from None
        except ValueError:
            tests = [tests]  # one statement
    if not isinstance(tests, list) or not tests:
        raise ValueError(f"expected a list of tests, got {str(ground_truth)[:80]!r}")
    return [_test(test, number) for number, test in enumerate(tests, 1)]


def _test(test: Any, number: int) -> dict[str, str]:
    if isinstance(test, str) and test.strip():
        try:
            compile(test, "<test>", "exec")
            idle = all(map(_is_value, ast.parse(test).body))
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:  # the last two: nested too deeply
            raise ValueError(f"test {number} is not Python: {error or type(error).__name__}: {test[:80]!r}") from None
        if idle:  # a list as Python prints it, say, in the place of JSON
            raise ValueError(f"test {number} tests nothing, every program passes: {test[:80]!r}; expected a statement, or JSON")
        return {"statement": test}
    if isinstance(test, dict) and test.keys() == {"input", "output"} and all(isinstance(text, str) for text in test.values()):
        return test
    raise ValueError(f"test {number}: expected a statement or an object with texts 'input' and 'output', got {str(test)[:80]!r}")


def _is_value(statement: ast.stmt) -> bool:
    """Return whether a statement is only a literal value, or ``pass``."""
    if isinstance(statement, ast.Pass):
        return True
    if not isinstance(statement, ast.Expr):
        return False
    try:
        ast.literal_eval(statement.value)
    except (ValueError, TypeError, MemoryError, RecursionError):
        return False
    return True
