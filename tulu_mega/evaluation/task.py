"""What an evaluation task is: a table of how its rows are read, asked and judged. No model, no vLLM."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tulu_mega.data.messages import Given

Row = Mapping[str, Any]
Messages = list[dict[str, str]]
Values = dict[str, tuple[float, int]]
"""What one response earned, by metric, as (sum, count): (1.0, 1) for a right answer, (2.0, 3) for two instructions of three."""


@dataclass(frozen=True)
class Problem:
    """One question and what its answer is compared with."""

    messages: Messages
    """ends with the user's turn"""
    answer: Any
    group: str = ""
    """subject or sub-task, for averages by group and for demonstrations of the same kind"""
    verifier: str | list[str] | None = None
    """names the verifier that judges the response, where the task's own judge does not"""
    begin: str = ""
    """what the answer begins with: given to the model, which goes on with it"""
    program: Callable[[str], str] | None = None
    """a response as the verifier reads it, where that is not the response itself"""
    given: Given | None = None
    """what a chat template gets beside the messages: tools and variables"""
    row: int | None = None
    """its place among the rows of the data, counted from 0, whichever of them are asked; None where it is of no data"""


@dataclass(frozen=True)
class Shot:
    """A worked example put before the question, as a turn of the user and one of the assistant."""

    question: str
    answer: str
    group: str = ""


@dataclass(frozen=True)
class Task:
    """A benchmark, with the settings that Tulu 3 evaluated it with."""

    name: str
    title: str
    fields: str
    """the fields a row must have, for messages"""
    hub: tuple[str, ...]
    """data sets of the hub, ``owner/name:configuration``, taken when no file is named; empty where there are none"""
    split: str
    read: Callable[[Row], Problem]
    """Raises ValueError: the row has another form."""
    max_tokens: int
    metrics: tuple[str, ...]
    """the first is the one that counts"""
    judge: Callable[[str, Any], Values] | None = None
    """response and the problem's answer to values; None leaves it to the problem's verifier"""
    shots: int = 0
    shot: Callable[[Row], Shot] | None = None
    """reads a demonstration from a row of a training split; None: the task takes none"""
    own_shots: tuple[Shot, ...] = ()
    """neutral demonstrations of our own, used when none are given"""
    macro: bool = False
    """the score is the mean over groups, not over problems"""
    choices: tuple[str, ...] = ()
    """the response is the most probable one of these tokens"""


def asked(question: str) -> Messages:
    """A question as a conversation."""
    return [{"role": "user", "content": question}]


def text_field(row: Row, name: str) -> str:
    """A field that must be text.

    Raises:
        ValueError: it is missing or something else.
    """
    value = row.get(name)
    if not isinstance(value, str):
        raise ValueError(f"{name} is {'missing' if name not in row else type(value).__name__}; expected text")
    return value
