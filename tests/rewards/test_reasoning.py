"""Reasoning is not judged; what of a reply is a program."""

import pytest

from tulu_mega.rewards.fences import fenced_blocks
from tulu_mega.rewards.reasoning import answer_of
from tulu_mega.rewards.verifiers.exact_match import ExactMatch
from tulu_mega.rewards.verifiers.format import Format
from tulu_mega.rewards.verifiers.gsm8k import Gsm8k
from tulu_mega.rewards.verifiers.ifeval import IfEval
from tulu_mega.rewards.verifiers.last_number import LastNumber
from tulu_mega.rewards.verifiers.math import MathAnswer
from tulu_mega.rewards.verifiers.python_code import program_of

NO_COMMAS = '{"func_name": "validate_no_commas"}'


@pytest.mark.parametrize(
    ("reply", "answer"),
    [
        ("a", "a"),
        ("<think>a</think>b", "b"),
        ("a</think>b", "b"),  # the prompt opened it
        ("<think>a</think>b<think>c</think>d", "d"),
        ("<think>a", ""),
        ("Well. <think>a", ""),
        ("<think>a</think>b<think>c", ""),
        ("", ""),
    ],
)
def test_the_answer_is_what_follows_the_reasoning(reply, answer):
    assert answer_of(reply) == answer


@pytest.mark.parametrize(
    ("verifier", "answer", "truth"),
    [(Gsm8k, "It is 7", "7"), (LastNumber, "-7", "-7"), (MathAnswer, r"\boxed{7}", "7"), (ExactMatch, "Paris", "Paris"),
     (IfEval, "yes", NO_COMMAS)],
)  # fmt: skip
def test_no_verifier_pays_for_reasoning(verifier, answer, truth):
    judge = verifier()
    assert judge(answer, truth).score == 1.0
    assert judge(f"<think>5, or \\boxed{{5}}</think>\n{answer}", truth).score == 1.0
    assert judge(f"<think>{answer}", truth).score == 0.0
    assert judge(f"<think>{answer}</think>I do not know, sorry", truth).score == 0.0


def test_the_demanded_form_may_name_the_tags():
    assert Format()("<think>a</think><answer>b</answer>", {"sections": ["<think>", "<answer>"]}).score == 1.0


CODE = "def f():\n    return 1\n"


@pytest.mark.parametrize(
    ("reply", "program"),
    [
        (f"```python\n{CODE}```", CODE),
        (f"~~~python\n{CODE}~~~", CODE),
        (f"~~~~ py\n{CODE}~~~~~  ", CODE),
        (f"````python\n{CODE}```\n````", f"{CODE}```\n"),
        (f"~~~python\n{CODE}```\n~~~", f"{CODE}```\n"),
        ("1. So:\n   ```python\n   def f():\n       return 1\n   ```", CODE),
        ("- So:\n    ```python\n    def f():\n        return 1\n    ```", CODE),
        ("  ```python\n  def f():\n      return 1\n```", CODE),
        ("  ```python\ndef f():\n   return 1\n  ```", "def f():\n return 1\n"),  # a line loses what indentation it has, at most 2
        ('```python\ndef f():\n    """x\n\n    ```\n    f()\n    ```\n    """\n    return 1\n```',
         'def f():\n    """x\n\n    ```\n    f()\n    ```\n    """\n    return 1\n'),
        (f"```python\n{CODE}```not the end\n```", f"{CODE}```not the end\n"),
        (f"``` a`b\n{CODE}", None),
        (f"```python\n{CODE}", None),
        (f"<think>\n```python\n{CODE}```\n</think>none", None),
        (f"```\nold\n```\n```Python3 title\n{CODE}```\n```sh\nls\n```", CODE),
        (f"```python\r\n{CODE}```", CODE),
    ],
)  # fmt: skip
def test_the_program_is_the_content_of_its_fence(reply, program):
    assert program_of(reply) == program


def test_fences_are_read_in_one_pass():
    import time

    start = time.process_time()
    assert fenced_blocks("```\n~~~\n```\n" * 30_000 + "`" * 100_000) == [("", "~~~\n")] * 30_000
    assert time.process_time() - start < 2


@pytest.mark.parametrize(
    ("reply", "truth"),
    [("It is 9{,}500.", "9500"), (r"\boxed{\$9{,}500}", "9500"), (r"1\,234\,567", "1234567"), (r"1,\!234", "1234"),
     ("1\u202f234", "1234"), ("So –3 degrees.", "-3"), ("So −3 degrees.", "-3"), ("pages 3–5", "5"), (r"3\,5", "5")],
)  # fmt: skip
def test_numbers_as_they_are_typeset(reply, truth):
    assert LastNumber()(reply, truth).score == 1.0
