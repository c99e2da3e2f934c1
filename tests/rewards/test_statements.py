"""Whose the names in a test are."""

from __future__ import annotations

import ast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tulu_mega.rewards.statements import prepared

PROMPT = '''Write `add`.

```python
import math
import numpy as np
from os import path
from .own import thing

K = 3
TABLE = {"a": [1, -2]}
BAD = print("x")

def helper(n):
    return math.floor(n) + K + other(n)

def other(n):
    return n

async def later(n):
    return n

def add(a, b):
    """Adds."""

def sub(a, b):
    raise NotImplementedError("yet")
```
'''


def test_well_known_names_beside_others_are_the_standard_librarys():
    found = prepared("assert isclose(f(1.5), math.pi) and Counter(f(2)) == Counter()")
    assert found["setup"].split("\n") == ["import math", "from collections import Counter", "from math import isclose"]
    assert found["theirs"] == []


def test_a_well_known_name_alone_is_the_programs():
    assert prepared("assert sqrt(4) == 2")["setup"] == ""
    assert prepared("def check(f):\n    assert f(4) == 2\ncheck(sqrt)")["setup"] == ""


def test_helpers_come_from_the_prompt_with_what_they_use():
    found = prepared("assert add(1, 2) == helper(3)", PROMPT)
    tree = ast.parse(found["setup"])
    defined = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    assert defined == {"helper", "other"}
    assert "K = 3" in found["setup"] and "import math" in found["setup"]
    assert "print" not in found["setup"] and "numpy" not in found["setup"] and ".own" not in found["setup"]


@pytest.mark.parametrize("statement", ["assert helper(3) == 6", "def check(f):\n    assert f(3) == 6\ncheck(helper)"])
def test_what_the_prompt_defines_and_the_test_asks_for_alone_is_the_programs(statement):
    assert prepared(statement, PROMPT)["setup"] == ""


@pytest.mark.parametrize("head", ["add", "sub"])
def test_a_function_that_the_prompt_only_begins_is_the_programs(head):
    assert "def " not in prepared(f"assert {head}(1, 2) == 3 and f(1) == 2", PROMPT)["setup"]


def test_pythons_own_names_are_pythons_but_where_one_is_asked_for():
    assert prepared("assert len(f(3)) == sum([1, 2])")["theirs"] == []
    assert prepared("assert sum([1, 2]) == 3")["theirs"] == ["sum"]
    assert prepared("def check(g):\n    assert g([1]) == 1\ncheck(max)")["theirs"] == ["max"]
    assert prepared("assert sorted(f(3)) == [1]", "def sorted(x):\n    pass\n")["theirs"] == ["sorted"]


def test_the_tests_own_names_are_its_own():
    found = prepared("K = 5\ndef helper(n):\n    return n\nassert f(K) == helper(5)", PROMPT)
    assert "helper" not in found["setup"] and "K = 3" not in found["setup"]


def test_code_of_a_prompt_without_fences_begins_where_all_is_code():
    prompt = "Please finish this.\nfrom nowhere we go\n\ndef helper(n):\n    return n\n\ndef add(a, b):\n    pass\n"
    assert prepared("assert add(1, helper(2)) == 3", prompt)["setup"].startswith("def helper")


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.sampled_from(["add", "helper", "K", "len", "math", "Counter", "np", "x", "later", "print", "__import__"]), min_size=1
    ),
    st.text(max_size=30) | st.sampled_from([PROMPT, "```\n" + PROMPT, "def f(:\n", "```python\nimport os\n```"]),
)
def test_the_setup_is_python_that_imports_the_standard_library_alone_and_calls_nothing(names, prompt):
    setup = ast.parse(prepared(f"assert add({', '.join(names)}) == {names[0]}.y", prompt)["setup"])
    for node in setup.body:
        assert isinstance(node, ast.Import | ast.ImportFrom | ast.FunctionDef | ast.AsyncFunctionDef | ast.Assign | ast.AnnAssign)
        if isinstance(node, ast.Assign):
            ast.literal_eval(node.value)
