"""BIG-Bench Hard (Suzgun et al., arXiv 2210.09261): chain of thought, then "the answer is ...", compared as text."""

from __future__ import annotations

import re
from typing import Any

from tulu_mega.evaluation.task import Problem, Row, Shot, Task, Values, asked, text_field
from tulu_mega.rewards.reasoning import answer_of

_ANSWER = re.compile(r"answer is:?", re.IGNORECASE)
_BOX = re.compile(r"\\(?:boxed|fbox|text|textbf|mathrm)\s*\{([^{}]*)\}")
_DASHES = str.maketrans(dict.fromkeys("\u2010\u2011\u2012\u2013\u2212\ufe63\uff0d", "-"))
_NAMED = re.compile(r"(?:the\s+)?(?:correct\s+)?(?:option|choice|letter|answer)\s*:?\s+", re.IGNORECASE)
_OPTION = re.compile(r"[(\[]?([A-Za-z])[)\]]|([A-Z])(?=[.,;:]|$)|([A-Z])(?=\s+(?:because|since|as)\b)")
_WORDS = ("yes", "no", "true", "false", "valid", "invalid")
_WORD = re.compile(rf"({'|'.join(_WORDS)})(?=[.,;:!]|\s+(?:because|since|as)\b)", re.IGNORECASE)
# Where an explanation begins: what is named there is no answer.
_REASON = re.compile(r"\b(?:because|since|as|not|rather|instead|which|while|whereas)\b|[.;](?=\s|$)", re.IGNORECASE)
_ANOTHER = re.compile(
    r"(?<!\w)[(\[][A-Za-z][)\]]|(?:\b(?:or|and)\b|[/&,+])\s*(?:(?:option|possibly|maybe|perhaps)\s+)?[A-HJ-Z](?![\w'])"
)


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
    """The line behind the last "answer is", without full stop, emphasis, dollars and box; None when there is none.

    Reasoning in ``<think>`` is not read.
    """
    answer = answer_of(response)
    found = None
    for found in _ANSWER.finditer(answer):  # noqa: B007  the last one
        pass
    lines = answer[found.end() :].strip().splitlines() if found else []
    return _plain(lines[0]) if lines else None


def judge(response: str, answer: Any) -> Values:
    """Whether what follows the last "answer is" is the expected text; case is not looked at.

    An option may be given with or without brackets, by the word "option" and with its text or a reason behind: ``(B)``,
    ``B``, ``option (B)``, ``(B), the second`` and ``(B), not (A)`` are one. Two options are no answer. A reason may follow
    a yes, no, true, false, valid or invalid as well.
    """
    got, expected = extract(response), _plain(answer)
    return {"exact_match": (float(got is not None and _says(got, expected)), 1)}


def _says(got: str, expected: str) -> bool:
    if got.casefold() == expected.casefold():
        return True
    if option := re.fullmatch(r"\(([A-Z])\)", expected):
        said = _NAMED.sub("", got, count=1) if _NAMED.match(got) else got
        found = _OPTION.match(said)
        if found is None or (found[1] or found[2] or found[3]).upper() != option[1]:
            return False
        return _ANOTHER.search(_REASON.split(said[found.end() :], maxsplit=1)[0]) is None
    if expected.casefold() in _WORDS and (word := _WORD.match(got)):
        rest = _REASON.split(got[word.end() :], maxsplit=1)[0].casefold()
        return word[1].casefold() == expected.casefold() and not set(re.findall(r"\w+", rest)) & set(_WORDS)
    return False


def _plain(text: str) -> str:
    text = _BOX.sub(r"\1", _BOX.sub(r"\1", text.translate(_DASHES))).strip()
    text = text.replace("**", "").strip("*").strip().removesuffix(".").strip().strip("*").strip()
    text = text.strip("$").strip().removesuffix(".").strip()
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
