"""HumanEval (Chen et al., arXiv 2107.03374): functions to complete from their docstring, judged by their unit tests.

Asked as lm-evaluation-harness asks `humaneval_instruct`: the function's beginning in the user's message, and once more as the
beginning of the answer, which the model goes on with. The program is that beginning and what follows, up to the end of the
fence or to the paper's stop sequences.
"""

from __future__ import annotations

from functools import partial

from tulu_mega.evaluation.programs import FENCE, VERIFIER, continued, fenced
from tulu_mega.evaluation.task import Problem, Row, Task, asked, text_field

STOPS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
"""The paper's: what begins behind the function is no part of it."""


def read(row: Row) -> Problem:
    """
    Raises:
        ValueError: a row of another form.
    """
    prompt, name, test = (text_field(row, field) for field in ("prompt", "entry_point", "test"))
    if not name.isidentifier():
        raise ValueError(f"entry_point is {name!r:.60}; expected the name of a function")
    code = f"{FENCE}python\n{prompt}\n"
    return Problem(
        asked(f"Write a solution to the following problem and make sure that it passes the tests:\n{code}{FENCE}\n"),
        [f"{test}\ncheck({name})"],
        verifier=VERIFIER,
        begin=f"Here is the completed function:\n{code}",
        program=partial(_program, prompt),
    )


def _program(prompt: str, response: str) -> str:
    return fenced(continued(prompt, response, STOPS))


TASK = Task(
    name="humaneval",
    title="HumanEval",
    fields="prompt (the function's beginning), entry_point (its name), test (defines check)",
    hub=("openai/openai_humaneval",),
    split="test",
    read=read,
    max_tokens=1024,
    metrics=("pass@1",),
)
