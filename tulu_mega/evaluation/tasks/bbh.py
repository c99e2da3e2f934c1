"""BIG-Bench Hard (Suzgun et al., arXiv 2210.09261): chain of thought, then "the answer is ...", compared as text."""

from __future__ import annotations

import re
from typing import Any

from tulu_mega.evaluation.task import Problem, Row, Shot, Task, Values, asked, text_field

_ANSWER = re.compile(r".*answer is:?[ \t]*(.+)", re.IGNORECASE)
_OPTION = re.compile(r"\(?([A-Za-z])\)(?:\s|$)|^([A-Z])$")


def _question(text: str) -> str:
    return f"Q: {text.strip()}\nA: Let's think step by step."


def read(row: Row) -> Problem:
    """
    Raises:
        ValueError: a row of another form.
    """
    return Problem(asked(_question(text_field(row, "input"))), text_field(row, "target").strip(), str(row.get("task") or ""))


def shot(row: Row) -> Shot:
    """A demonstration from a row with its worked `cot` (reasoning up to "So the answer is ...").

    Raises:
        ValueError: a row of another form.
    """
    worked = row.get("cot")
    answer = worked if isinstance(worked, str) else f"So the answer is {text_field(row, 'target').strip()}."
    return Shot(_question(text_field(row, "input")), answer.strip(), str(row.get("task") or ""))


def extract(response: str) -> str | None:
    """The text after the last "the answer is", on its line, without the full stop and emphasis; None when there is none."""
    found = _ANSWER.findall(response)
    return _plain(found[-1]) if found else None


def judge(response: str, answer: Any) -> Values:
    """Whether what follows the last "the answer is" is the expected text; case is not looked at.

    An option may be given with or without brackets, and with its text behind: ``(B)``, ``B`` and ``(B) the second`` are one.
    """
    got, expected = extract(response), _plain(answer)
    right = got is not None and got.casefold() == expected.casefold()
    option = re.fullmatch(r"\(([A-Z])\)", expected)
    if not right and got is not None and option:
        said = _OPTION.match(got)
        right = said is not None and (said[1] or said[2]).upper() == option[1]
    return {"exact_match": (float(right), 1)}


def _plain(text: str) -> str:
    text = text.strip().strip("*").strip().removesuffix(".").strip().strip("*").strip()
    return text[1:-1].strip() if len(text) > 1 and text[0] == text[-1] and text[0] in "\"'`" else text


_OWN = (
    ("not ( False or True ) and True is",
     "The bracket ( False or True ) is True. Then not True is False, and False and True is False. So the answer is False."),
    ("Tom is taller than Ann. Ann is taller than Ray. Who is the shortest?\nOptions:\n(A) Tom\n(B) Ann\n(C) Ray",
     "Tom is above Ann and Ann is above Ray. So Ray is the shortest, which is option (C). So the answer is (C)."),
    ("I have a pear, two chairs and three plums. How many fruits do I have?",
     "Pears and plums are fruits, chairs are not. There is 1 pear and there are 3 plums, 1 + 3 = 4. So the answer is 4."),
)  # fmt: skip

TASK = Task(
    name="bbh",
    title="BIG-Bench Hard",
    fields='input, target, task to average over (files of the public repository: {"examples": [{"input", "target"}]})',
    hub=(),
    split="test",
    read=read,
    max_tokens=512,
    metrics=("exact_match",),
    judge=judge,
    shots=3,
    shot=shot,
    own_shots=tuple(Shot(_question(text), work) for text, work in _OWN),
)
