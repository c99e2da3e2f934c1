"""MMLU (Hendrycks et al., arXiv 2009.03300): the most probable of the letters A to D is the model's answer.

The response is held to the four letters, so it is the one with the highest log-probability, as in ranking the choices.
"""

from __future__ import annotations

from typing import Any

from tulu_mega.evaluation.task import Problem, Row, Shot, Task, Values, asked, text_field

LETTERS = ("A", "B", "C", "D")


def _question(subject: str, question: str, choices: list[str] | tuple[str, ...]) -> str:
    about = f" about {subject.replace('_', ' ')}" if subject else ""
    options = "".join(f"\n{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=True))
    return f"Answer the following multiple choice question{about} with its letter.\n\n{question.strip()}{options}\nAnswer:"


def _parts(row: Row) -> tuple[str, str, str]:
    """Question, right letter and subject."""
    choices, answer = row.get("choices"), row.get("answer")
    if not isinstance(choices, list | tuple) or len(choices) != 4 or not all(isinstance(choice, str) for choice in choices):
        raise ValueError("choices is not a list of 4 texts")
    subject = row.get("subject") or ""
    question = _question(str(subject), text_field(row, "question"), list(choices))
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < 4:
        return question, LETTERS[answer], str(subject)
    if answer in LETTERS:
        return question, answer, str(subject)
    raise ValueError(f"answer is {answer!r}; expected 0 to 3 or A to D")


def read(row: Row) -> Problem:
    """
    Raises:
        ValueError: a row of another form.
    """
    question, letter, subject = _parts(row)
    return Problem(asked(question), letter, subject)


def shot(row: Row) -> Shot:
    """
    Raises:
        ValueError: a row of another form.
    """
    return Shot(*_parts(row))


def judge(response: str, answer: Any) -> Values:
    """Whether the response is the right letter."""
    return {"accuracy": (float(response.strip() == answer), 1)}


_OWN = (
    ("Which of these is a prime number?", ("21", "27", "29", "33"), "C"),
    ("What does a thermometer measure?", ("Temperature", "Pressure", "Speed", "Mass"), "A"),
    ("Which of these animals is a bird?", ("Bat", "Penguin", "Dolphin", "Frog"), "B"),
    ("Which word means the opposite of 'ancient'?", ("Old", "Large", "Quiet", "Modern"), "D"),
    ("How many sides has a hexagon?", ("5", "6", "7", "8"), "B"),
)

TASK = Task(
    name="mmlu",
    title="MMLU",
    fields="question, choices (4 texts), answer (0 to 3 or A to D), subject",
    hub=("cais/mmlu:all",),
    split="test",
    read=read,
    max_tokens=1,
    metrics=("accuracy",),
    judge=judge,
    shots=5,
    shot=shot,
    own_shots=tuple(Shot(_question("", text, choices), letter) for text, choices, letter in _OWN),
    macro=True,
    choices=LETTERS,
)
