"""Arithmetic word problems with verifiable answers, made from a seed.

A story opens with a count of objects and one or two events change it. Its *matter* (the objects and the arithmetic, say
``pens: 12 + 5 - 3``) decides by a checksum whether the problem is held out, so that no problem of the training set, under
whatever names and wording, is ever asked in the evaluation.

Demonstrations come in four styles: worked, careless (worked, with a slip in it), terse and guessed (terse, beside the answer).
Stories with one event are worked out; most of those with two are not, though two steps at once are hard. Supervised fine-tuning
teaches both habits and prefers the wrong one: what reinforcement learning is there to turn round. Preference pairs leave the
habit as it is and teach to tell right from wrong.
"""

from __future__ import annotations

import json
import os
import random
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tulu_mega.errors import UserError

Operator = Literal["+", "-", "x"]
Split = Literal["train", "heldout"]

VERIFIER = "gsm8k"
"""The `dataset` column: which verifier judges the answer (the last number, string equality)."""

SLIPS = (-10, -2, -1, 1, 2, 10)
"""Errors of a step of careless work."""
COARSE_SLIPS = (-10, 10)
"""Those of them that a reward model of a million parameters sees: of slips by 1 and 2 it tells 53 to 61%."""

_HELDOUT_SHARE = 8  # one problem in eight
_NAMES = ("Ada", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gina", "Hugo", "Iris", "Jack", "Kim", "Leo")
_OBJECTS = ("apples", "books", "cards", "coins", "eggs", "pens", "shells", "stones")
_CONTAINERS = ("bags", "boxes", "jars")

_OPENINGS = ("{name} has {a} {objects}.", "{name} starts with {a} {objects}.", "There are {a} {objects}.")
_PRODUCTS = ("{name} has {b} {containers} of {a} {objects}.", "There are {b} {containers} of {a} {objects}.")
_EVENTS: dict[str, tuple[str, ...]] = {
    "+": ("{name} buys {b} more.", "{friend} brings {b}.", "{name} finds {b}."),
    "-": ("{name} loses {b}.", "{friend} takes {b}.", "{name} gives away {b}."),
}
_QUESTIONS = ("How many {objects} are there now?", "How many are left?", "How many {objects} does {name} have?")
_KINDS: dict[int, tuple[tuple[Operator, ...], ...]] = {
    1: (("+",), ("-",)),  # no lone products: there are too few of them to hold any out
    2: (("+", "+"), ("+", "-"), ("-", "+"), ("-", "-"), ("x", "+"), ("x", "-")),
}


@dataclass(frozen=True)
class Problem:
    """One word problem.

    >>> Problem("Ada has 14 pens. ...", 14, (("+", 23), ("-", 9))).answer
    28
    """

    question: str
    start: int
    steps: tuple[tuple[Operator, int], ...]

    @property
    def values(self) -> list[int]:
        """The count at the opening and after every step."""
        values = [self.start]
        for operator, number in self.steps:
            values.append(_apply(values[-1], operator, number))
        return values

    @property
    def answer(self) -> int:
        return self.values[-1]


@dataclass(frozen=True)
class Mixture:
    """What the demonstrations are made of."""

    two_step: float = 0.6
    """Share of the problems with two steps; the others have one."""
    terse: float = 0.6
    """Share of the two-step demonstrations that give the answer alone. One-step demonstrations are never terse."""
    careless: float = 0.1
    """Share of the worked demonstrations with a slip in one step."""
    guessed: float = 0.4
    """Share of the terse demonstrations that are wrong by 1 to 3."""


def split_of(objects: str, start: int, steps: Iterable[tuple[Operator, int]]) -> Split:
    """Return whether a problem's matter is for training or held out; the same for every seed, on every machine."""
    matter = f"{objects}: {start}" + "".join(f" {operator} {number}" for operator, number in steps)
    return "heldout" if zlib.crc32(matter.encode()) % _HELDOUT_SHARE == 0 else "train"


def problems(split: Split, seed: int | str, two_step: float = Mixture.two_step) -> Iterator[Problem]:
    """An endless stream of problems of one side of the split; the same for the same arguments.

    Args:
        split: the side that every problem is on.
        seed: any integer, or text.
        two_step: share of two-step problems.
    """
    draw = random.Random(f"{split} problems {seed}")
    while True:
        kind = draw.choice(_KINDS[2 if draw.random() < two_step else 1])
        start, steps = _numbers(draw, kind)
        objects = draw.choice(_OBJECTS)
        if split_of(objects, start, steps) == split:
            yield Problem(_story(draw, objects, start, steps), start, steps)


def demonstrations(seed: int, mixture: Mixture = Mixture()) -> Iterator[dict[str, Any]]:
    """An endless stream of training rows: `messages` (user, assistant), `ground_truth`, `dataset`."""
    draw = random.Random(f"demonstrations {seed}")
    for problem in problems("train", seed, mixture.two_step):
        terse, careless, guessed = (draw.random() < share for share in (mixture.terse, mixture.careless, mixture.guessed))
        if terse and len(problem.steps) > 1:
            response = _terse(_beside(draw, problem.answer, 1, 3) if guessed else problem.answer)
        else:
            response = _worked(problem, slip=draw if careless else None)
        row = prompt_row(problem)
        yield {**row, "messages": [*row["messages"], {"role": "assistant", "content": response}]}


def pairs(split: Split, seed: int, terse: float = 0.5, slips: Sequence[int] = SLIPS) -> Iterator[dict[str, Any]]:
    """An endless stream of preference rows: `chosen` and `rejected` (user, assistant), a right answer and a wrong one.

    Both are in the same style, for that share the terse one, so that what is preferred is being right and not being long. A
    terse answer is wrong by 5 and more: what a guess can tell.

    Args:
        slips: what a step of careless work may be wrong by; one of them positive.
    """
    draw = random.Random(f"{split} pairs {seed}")
    for problem in problems(split, f"{seed} pairs", two_step=0.8):
        prompt = prompt_row(problem)["messages"]
        if draw.random() < terse:
            right, wrong = _terse(problem.answer), _terse(_beside(draw, problem.answer, 5, 15))
        else:
            right, wrong = _worked(problem, slip=None), _worked(problem, slip=draw, slips=slips)
        sides = {"chosen": right, "rejected": wrong}
        yield {side: [*prompt, {"role": "assistant", "content": text}] for side, text in sides.items()}


def prompt_row(problem: Problem) -> dict[str, Any]:
    """A row to be answered: `messages` (user alone), `ground_truth`, `dataset`."""
    messages = [{"role": "user", "content": problem.question}]
    return {"messages": messages, "ground_truth": str(problem.answer), "dataset": VERIFIER}


def extract_answer(text: str) -> str | None:
    """The last number of a text, thousands' commas stripped; None when there is none.

    >>> extract_answer("6 x 200 = 1,200. The answer is 1,200.")
    '1200'
    """
    numbers = re.findall(r"(?<![\d.])-?\d+(?:\.\d+)?", re.sub(r"(?<=\d),(?=\d)", "", text))
    return numbers[-1] if numbers else None


def is_correct(text: str, ground_truth: str) -> bool:
    """Whether the last number of the text is the expected one, digit by digit."""
    return extract_answer(text) == ground_truth


def write_jsonl(rows: Iterable[dict[str, Any]], path: Path) -> None:
    """One JSON object a line. The file appears when it is complete.

    Raises:
        UserError: the file cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("w", encoding="utf-8") as file:
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); choose a directory that you may write") from None


def _apply(value: int, operator: Operator, number: int) -> int:
    match operator:
        case "+":
            return value + number
        case "-":
            return value - number
        case "x":
            return value * number


def _numbers(draw: random.Random, kind: tuple[Operator, ...]) -> tuple[int, tuple[tuple[Operator, int], ...]]:
    """Numbers for the operations, such that every count on the way stays within 1 to 99."""
    value = start = draw.randint(2, 5) if kind[0] == "x" else draw.randint(3, 12)
    steps: list[tuple[Operator, int]] = []
    for operator in kind:
        match operator:
            case "+":
                number = draw.randint(1, 6)
            case "-":
                number = draw.randint(1, min(6, value - 1))
            case "x":
                number = draw.randint(2, 5)
        steps.append((operator, number))
        value = _apply(value, operator, number)
        if value < 2:
            return _numbers(draw, kind)
    return start, tuple(steps)


def _story(draw: random.Random, objects: str, start: int, steps: tuple[tuple[Operator, int], ...]) -> str:
    name, friend = draw.sample(_NAMES, 2)
    words = {"name": name, "friend": friend, "objects": objects, "containers": draw.choice(_CONTAINERS)}
    operator, number = steps[0]
    if operator == "x":
        sentences = [draw.choice(_PRODUCTS).format(a=start, b=number, **words)]
        events = steps[1:]
    else:
        sentences = [draw.choice(_OPENINGS).format(a=start, **words)]
        events = steps
    sentences += [draw.choice(_EVENTS[operator]).format(b=number, **words) for operator, number in events]
    return " ".join([*sentences, draw.choice(_QUESTIONS).format(**words)])


def _terse(answer: int) -> str:
    return f"The answer is {answer}."


def _beside(draw: random.Random, answer: int, least: int, most: int) -> int:
    """A positive number that is not the answer but within so much of it."""
    return draw.choice([answer + sign * by for by in range(least, most + 1) for sign in (1, -1) if answer + sign * by > 0])


def _worked(problem: Problem, slip: random.Random | None, slips: Sequence[int] = SLIPS) -> str:
    """Return the text of every step and the answer. With a slip one step is wrong, and later steps build on its count."""
    wrong = slip.randrange(len(problem.steps)) if slip else None
    value, lines = problem.start, []
    for index, (operator, number) in enumerate(problem.steps):
        result = _apply(value, operator, number)
        if index == wrong:
            taken = sum(number for operator, number in problem.steps[index + 1 :] if operator == "-")
            result += slip.choice([by for by in slips if result + by >= taken])  # no count below 0
        lines.append(f"{value}{operator}{number}={result}.")
        value = result
    return " ".join([*lines, f"The answer is {value}."])
