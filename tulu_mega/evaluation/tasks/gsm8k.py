"""GSM8K (Cobbe et al., arXiv 2110.14168): grade-school word problems, the last number of the response is the answer."""

from __future__ import annotations

import re

from tulu_mega.evaluation.task import Problem, Row, Shot, Task, asked, text_field

_ANSWER = re.compile(r"####\s*(\S.*?)\s*$")
_CALCULATOR = re.compile(r"<<[^>]*>>")


def _question(text: str) -> str:
    return f"Question: {text.strip()}\nAnswer:"


def _parts(row: Row) -> tuple[str, str, str]:
    """Question, reasoning and final number."""
    solution = text_field(row, "answer")
    found = _ANSWER.search(solution)
    if not found:
        raise ValueError("answer has no '#### number' at its end")
    return text_field(row, "question"), solution[: found.start()].strip(), found[1].replace(",", "")


def read(row: Row) -> Problem:
    """
    Raises:
        ValueError: a row of another form.
    """
    question, _, number = _parts(row)
    return Problem(asked(_question(question)), number, verifier="last_number")


def shot(row: Row) -> Shot:
    """A demonstration from a row: the calculator's notes left out, the answer in a sentence.

    Raises:
        ValueError: a row of another form.
    """
    question, reasoning, number = _parts(row)
    return Shot(_question(question), f"{_CALCULATOR.sub('', reasoning)}\nSo the answer is {number}.")


_OWN = (
    ("A shelf holds 14 jars. Nora puts 9 more on it and then takes 4 away. How many jars are on the shelf?",
     "There are 14 + 9 = 23 jars after Nora adds some. She takes 4 away, which leaves 23 - 4 = 19.", 19),
    ("A ticket costs 6 dollars. How much do 7 tickets cost, if there is a discount of 5 dollars on the whole?",
     "The tickets cost 6 * 7 = 42 dollars. With the discount it is 42 - 5 = 37 dollars.", 37),
    ("A rope of 60 metres is cut into pieces of 4 metres. A third of the pieces are sold. How many pieces are left?",
     "There are 60 / 4 = 15 pieces. A third of them is 15 / 3 = 5. So 15 - 5 = 10 pieces are left.", 10),
    ("Omar reads 12 pages each weekday and 20 pages on each day of the weekend. How many pages does he read in a week?",
     "On 5 weekdays he reads 12 * 5 = 60 pages. On 2 days of the weekend he reads 20 * 2 = 40. Together that is 60 + 40 = 100.",
     100),
    ("A tank with 250 litres loses 15 litres an hour. How many litres are in it after 6 hours?",
     "In 6 hours it loses 15 * 6 = 90 litres. Then 250 - 90 = 160 litres are left.", 160),
    ("Three friends share the cost of a tent for 84 dollars and a lamp for 18 dollars equally. What does each of them pay?",
     "Together it costs 84 + 18 = 102 dollars. Each pays 102 / 3 = 34 dollars.", 34),
    ("A box has twice as many red beads as blue ones. There are 36 blue beads. How many beads are in the box?",
     "There are 36 * 2 = 72 red beads. Together there are 72 + 36 = 108 beads.", 108),
    ("A bus starts with 31 people. At each of 3 stops 5 people leave and 2 get on. How many people are on it then?",
     "At each stop there are 5 - 2 = 3 people fewer. After 3 stops it is 3 * 3 = 9 fewer. So 31 - 9 = 22 people are on it.", 22),
)  # fmt: skip

TASK = Task(
    name="gsm8k",
    title="GSM8K",
    fields="question, answer (text that ends in '#### number')",
    hub=("openai/gsm8k:main",),
    split="test",
    read=read,
    max_tokens=512,
    metrics=("exact_match",),
    shots=8,
    shot=shot,
    own_shots=tuple(Shot(_question(text), f"{work} So the answer is {number}.") for text, work, number in _OWN),
)
