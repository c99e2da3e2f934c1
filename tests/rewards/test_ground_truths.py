"""Ground truths that say nothing, or two things, are refused: every response would earn."""

from __future__ import annotations

import json

import pytest

from tulu_mega.rewards import code_tests
from tulu_mega.rewards.constraints import read_constraint

STATEMENTS = ["assert f(1) == 2", "f(1)", "import math; f(math.pi)", "x = f(1)\nassert x"]


IDLE = ["['assert f(1) == 2']", "{'input': '1'}", "5", "'assert f(1)'", "# f(1) == 2", "pass", "(1, -2)"]


@pytest.mark.parametrize("idle", IDLE)
def test_a_test_that_tests_nothing_is_refused(idle):
    for given in (idle, [idle], json.dumps([idle]), ["assert f(1) == 2", idle]):
        with pytest.raises(ValueError, match=r"test [12] tests nothing, every program passes|expected a"):
            code_tests.tests_of(given)


@pytest.mark.parametrize("statement", STATEMENTS)
def test_statements_are_tests(statement):
    for given in (statement, [statement], json.dumps([statement])):
        assert code_tests.tests_of(given) == [{"statement": statement}]


def test_a_name_that_a_ground_truth_has_twice_is_refused():
    with pytest.raises(ValueError, match="the tests are not valid JSON: it has 'output' twice"):
        code_tests.tests_of('[{"input": "1", "output": "2", "output": "3"}]')
    with pytest.raises(ValueError, match="it has 'func_name' twice"):
        read_constraint('{"func_name": "validate_no_commas", "func_name": "validate_lowercase"}')
    with pytest.raises(ValueError, match="brackets are nested too deeply"):
        read_constraint('{"func_name": ' + "[" * 100_000)
