"""MATH (Hendrycks et al., arXiv 2103.03874): competition problems, answers compared as mathematics."""

from __future__ import annotations

from math import isfinite

from tulu_mega.evaluation.task import Problem, Row, Shot, Task, asked, text_field
from tulu_mega.rewards.mathematics.finding import last_boxed


def _question(text: str) -> str:
    return f"Problem:\n{text.strip()}\n\nSolution:"


def _answer(row: Row) -> str:
    answer = row.get("answer")
    if isinstance(answer, str) or type(answer) is int or (isinstance(answer, float) and isfinite(answer)):
        return str(answer)
    answer = last_boxed(text_field(row, "solution"))
    if answer is None:
        raise ValueError("no answer, and no \\boxed{...} in its solution")
    return answer


def read(row: Row) -> Problem:
    """
    Raises:
        ValueError: a row of another form.
    """
    group = row.get("type") or row.get("subject") or ""
    return Problem(asked(_question(text_field(row, "problem"))), _answer(row), str(group), verifier="math")


def shot(row: Row) -> Shot:
    """
    Raises:
        ValueError: a row of another form.
    """
    return Shot(_question(text_field(row, "problem")), _worked(text_field(row, "solution"), _answer(row)))


def _worked(solution: str, answer: str) -> str:
    return f"{solution.strip()}\nFinal Answer: The final answer is ${answer}$. I hope it is correct."


_OWN = (
    (r"Solve $3x + 7 = 22$ for $x$.",
     r"Subtracting $7$ gives $3x = 15$. Dividing by $3$ gives $x = \boxed{5}$.", "5"),
    (r"Two fair dice are rolled. What is the probability that both show an even number?",
     r"Each die is even with probability $\frac{1}{2}$, and they are independent, so the probability is "
     r"$\frac{1}{2} \cdot \frac{1}{2} = \boxed{\frac{1}{4}}$.", r"\frac{1}{4}"),
    (r"A right triangle has legs of $5$ and $12$. What is the length of its hypotenuse?",
     r"By the theorem of Pythagoras its square is $5^2 + 12^2 = 25 + 144 = 169$. So the length is $\sqrt{169} = \boxed{13}$.",
     "13"),
    (r"What is the remainder when $2^{10}$ is divided by $7$?",
     r"Since $2^3 = 8$ leaves $1$, $2^{10} = (2^3)^3 \cdot 2$ leaves $1^3 \cdot 2 = \boxed{2}$.", "2"),
)  # fmt: skip

_SUBJECTS = ("algebra", "counting_and_probability", "geometry", "intermediate_algebra", "number_theory", "prealgebra",
             "precalculus")  # fmt: skip

TASK = Task(
    name="math",
    title="MATH",
    fields="problem, solution (with \\boxed{...}) or answer, and type (or subject) to average over",
    hub=tuple(f"EleutherAI/hendrycks_math:{subject}" for subject in _SUBJECTS),
    split="test",
    read=read,
    max_tokens=1024,
    metrics=("exact_match_flex",),
    shots=4,
    shot=shot,
    own_shots=tuple(Shot(_question(text), _worked(work, answer)) for text, work, answer in _OWN),
    macro=True,
)
