"""Parsers of what models say: verifiers, the judges of evaluations, and the sandbox's messages."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.lib.fuzzing import Parser
from tulu_mega.evaluation.tasks import TASKS
from tulu_mega.rewards.fences import fenced_blocks
from tulu_mega.rewards.mathematics.equality import equivalent
from tulu_mega.rewards.mathematics.finding import candidates
from tulu_mega.rewards.registry import Judge
from tulu_mega.rewards.sandboxed.values import Decoder, Encoder, Malformed, Untold, unpack
from tulu_mega.rewards.statements import prepared
from tulu_mega.rewards.verdict import VerifierInput
from tulu_mega.rewards.verifiers.python_code import program_of

MATHS = (
    b"\\boxed{", b"}", b"\\frac{", b"\\sqrt", b"^", b"_", b"{", b"$", b"$$", b"\\[", b"\\]", b"\\text{", b"\\%",
    b"\\overline{3}", b"\\begin{pmatrix}", b"\\end{pmatrix}", b"!", b"99999999", b"1/3", b",", b"\\pi", b"\\int",
    b"\\sum_{k=1}^{9}", b"\\cup", b"\\infty", b"Final Answer: The final answer is ", b"I hope it is correct.", b"x=", b"\\le",
    b"10^{10^{10}}", b"\\binom{9}{3}", b"#### ", b"-",
)  # fmt: skip
ANSWERS = {
    "gsm8k": [("So 3 + 4 = 7.\n#### 7", "7"), ("It is $1,200.50.", "1200.5")],
    "math": [
        ("Thus $x = \\boxed{\\frac{3}{4}}$.", "\\frac34"),
        ("Final Answer: The final answer is $(1,2]\\cup[3,\\infty)$. I hope it is correct.", "(1,2] \\cup [3, \\infty)"),
        ("\\[\\boxed{\\begin{pmatrix}1\\\\2\\end{pmatrix}}\\]", "\\begin{pmatrix}1\\\\2\\end{pmatrix}"),
        ("The answer is $50\\%$ or $5\\text{ cm}$ or 1011_2.", "\\sqrt{2}+\\pi"),
    ],
    "last_number": [("from 3 to -7.0 %", -7), ("\\$1{,}234", "1234")],
    "exact_match": [("Yes,  b.", ["Yes, b.", "No"])],
    "ifeval": [
        ("Some words. <<Title>> * a\n* b\n[x]", {"func_name": "validate_word_constraint", "N": 3, "quantifier": "at least"}),
        ("A. B. C.", {"func_name": "verify_sentence_constraint", "N": 3, "quantifier": "around"}),
        ("x", {"func_name": "validate_choice", "options": "('x', 'y')"}),
        ("x", {"func_name": "verify_keywords", "keyword_list": ["x"], "N": None}),
    ],
    "format": [("<think>x</think><answer>y</answer>", "<think>...</think><answer>...</answer>")],
}  # fmt: skip
TEST = (
    "def check(f):\n    assert f([1, 2], x=3) == {'a': (1, 2)}\n    assert all(f(n) == helper(n) for n in range(3))\ncheck(add)"
)
PROMPT = (
    "import math\nfrom typing import List\n\ndef helper(n: int) -> int:\n"
    "    return math.floor(n) + K\nK = 3\n\ndef add(a, b):\n    '''Adds.'''\n"
)
VALUES = [
    ["call", "f", [["l", 1, ["t", None, True, 1.5]], ["d", "a", ["s", 1, 2]]], {"k": ["b", "00ff"]}],
    ["value", ["C", "a", 1], ["O", "a", 1], ["D", "a", 1], ["q", 3, 1, 2], ["F", 1, 3], ["E", "1.5"], ["i", "0x" + "f" * 40]],
    ["value", ["Y", "2020-01-02"], ["T", "2020-01-02T03:04:05"], ["A", 1, 2, 3], ["N", "P", ["l", "x", "y"], 1, 2], ["#", 3]],
    ["value", ["c", 1.0, 2.0], ["R", 0, 9, 2], ["n", "nan"], ["f", 1, ["t", 2]], ["B", "ff"], ["r", 0]],
]


def seeds(rows: list[dict[str, Any]]) -> list[bytes]:
    return [json.dumps(row).encode() for row in rows]


def parsers(place: Path) -> dict[str, Parser]:
    return {**verifiers(), **mathematics(), **judges(), **programs()}


def verifiers() -> dict[str, Parser]:
    judge = Judge()

    def judged(data: bytes) -> None:
        row = _row(data)
        if isinstance(row["response"], str) and not judge.check(row):
            verdict = judge(VerifierInput(row["response"], row["dataset"], row["ground_truth"]))
            assert verdict.error is None, verdict.error

    found = {
        f"verifier {name}": Parser(
            judged, seeds([{"dataset": name, "response": said, "ground_truth": truth} for said, truth in cases]),
            (Unread,), MATHS,
        )
        for name, cases in ANSWERS.items()
    }  # fmt: skip
    both = {"dataset": ["gsm8k", "exact_match"], "response": "7", "ground_truth": ["7", ["7"]]}
    code = {"dataset": "python_code", "response": None, "ground_truth": [TEST, {"input": "3", "output": "4"}]}
    return {
        **found,
        "several verifiers": Parser(judged, seeds([both]), (Unread,)),
        "tests of programs": Parser(
            lambda data: judge.check(_row(data)), seeds([code, code | {"ground_truth": json.dumps([TEST])}]), (Unread,)
        ),
    }


class Unread(Exception):
    """The input is no row: nothing of ours would see it."""


def _row(data: bytes) -> dict[str, Any]:
    """A row as `data` has read it: JSON, or else the bytes as a reply to a question of arithmetic."""
    try:
        row = json.loads(data)
    except (ValueError, RecursionError):
        row = {"response": data.decode(errors="replace"), "dataset": "math", "ground_truth": "3"}
    if not isinstance(row, dict) or not {"response", "dataset", "ground_truth"} <= row.keys():
        raise Unread
    if not isinstance(row["response"], str | None):
        raise Unread
    return row


def mathematics() -> dict[str, Parser]:
    def compared(data: bytes) -> None:
        text = data.decode(errors="replace")
        left, _, right = text.partition("\n")
        candidates(text)
        equivalent(left, right)

    pairs = [f"{truth}\n{said}".encode() for said, truth in ANSWERS["math"]] + [
        b"\\frac{1}{2}\n0.5",
        b"{1,2,3}\n3,2,1",
        b"x^2+1\n1+x^2",
    ]
    return {"answers in LaTeX": Parser(compared, pairs, (), MATHS)}


def judges() -> dict[str, Parser]:
    def of(name: str) -> Parser:
        answer = {"gsm8k": "4", "math": "4", "mmlu": "A", "bbh": "(A)"}[name]
        judge = TASKS[name].judge

        def judged(data: bytes) -> None:
            judge(data.decode(errors="replace"), answer)

        said = [
            b"Let's see. So the answer is (A), the first. \\boxed{4} #### 4",
            b"<think>no</think> The answer is: **(B)** because",
        ]
        return Parser(judged, said, (), MATHS)

    return {f"answers of {name}": of(name) for name in ("gsm8k", "math", "bbh", "mmlu") if TASKS[name].judge}


def programs() -> dict[str, Parser]:
    def replies(data: bytes) -> None:
        text = data.decode(errors="replace")
        fenced_blocks(text)
        program_of(text)

    def statements(data: bytes) -> None:
        statement, _, prompt = data.decode(errors="replace").partition("\0")
        compile(statement, "<test>", "exec")
        prepared(statement, prompt)

    reply = b"Here:\n```python\ndef add(a, b):\n    '''x\n    ```\n    '''\n    return a + b\n```\n\n~~~\nx = 1\n~~~\n"
    sound = [f"{TEST}\0{PROMPT}".encode(), b"assert isclose(f(1.5), math.pi)\0" + reply]
    sound += [b"assert Counter(f('x')) == Counter()\0"]
    fences = (b"```", b"~~~", b"````", b"```python\n", b"\n", b"    ")
    syntax = (b"def f():\n", b"lambda: ", b"(" * 150, b"[x for x in ", b"@", b"async ", b"global x\n", b"nonlocal x\n",
              b"import ", b"\0", b"class A: pass\n", b"x: int\n", b"*", b"match x:\n case [*_]: ...\n",
              b"f'{x!r:>{y}}'", b"1" * 5000, b"-" * 3000)  # fmt: skip
    return {
        "fences of a reply": Parser(replies, [reply], (), fences),
        # what `check` refuses is not prepared
        "statements of a test": Parser(statements, sound, (SyntaxError, ValueError, RecursionError, MemoryError), syntax),
        "the sandbox's values": Parser(_values(), seeds(VALUES), (Malformed,)),
    }


def _values() -> Callable[[bytes], object]:
    def special(told: list) -> Any:
        raise Malformed("no data")

    def untold(value: Any) -> list:
        raise Untold(type(value).__name__)

    def parse(data: bytes) -> None:
        message = unpack(data)
        decode = Decoder(special, keep=True)
        for part in message:
            with contextlib.suppress(Malformed):
                value = decode(part)
                with contextlib.suppress(Untold):
                    Encoder(untold)(value)

    return parse
