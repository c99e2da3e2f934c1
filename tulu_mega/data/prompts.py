"""Prompts with verifiable answers, tokenised, in a seeded endless order."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from tulu_mega.config import FormName
from tulu_mega.data.chat import Template, prompt_of
from tulu_mega.data.forms.reading import read
from tulu_mega.data.loader import epoch_order
from tulu_mega.data.messages import PROMPT_COLUMNS, conversation_of
from tulu_mega.data.sources import Rows
from tulu_mega.data.told import lines
from tulu_mega.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_SHOWN = 20
_COLUMNS = ("messages", "ground_truth", "dataset", *PROMPT_COLUMNS)


@dataclass(frozen=True)
class Prompt:
    """A row to be answered."""

    ids: list[int]
    """tokens up to where the assistant's turn begins"""
    messages: list[dict[str, str]]
    ground_truth: Any
    dataset: str | list[str]
    """name of the verifier, or names of several"""
    where: str
    """file and line"""


@dataclass(frozen=True)
class PromptSet:
    """The rows that can be used, in file order."""

    prompts: list[Prompt]
    rejects: list[dict[str, str]] = field(default_factory=list)
    """rows that are not used: ``where``, ``kind`` (malformed, too_long) and ``reason``"""
    told: list[str] = field(default_factory=list)
    """what is not used of the rows that are, a line each"""

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, index: int) -> Prompt:
        return self.prompts[index]


def read_prompts(
    rows: Rows,
    tokenizer: PreTrainedTokenizerFast,
    template: Template,
    max_prompt: int,
    malformed: str,
    judgeable: Callable[[dict[str, Any]], list[str]],
    setting: str = "data.train",
    form: FormName = "auto",
) -> PromptSet:
    """
    Args:
        max_prompt: longest prompt in tokens; rows with a longer one are rejects.
        malformed: ``error`` or ``reject``, for rows that cannot be read, rendered or judged.
        judgeable: the problems of a row's ``dataset`` and ``ground_truth``.
        setting: where the rows are named, for messages.
        form: of the rows.

    Raises:
        UserError: rows that cannot be used, the first 20 of them by file and line; or none that can.
    """
    prompts, rejects, problems, wrong = [], [], [], 0
    told: Counter[str] = Counter()
    for index in range(len(rows)):
        where = rows.where(index)
        try:
            made = read(rows.row(index), "prompt", form)
            row = made.row
            prompt, unread = _prompt(row, where, tokenizer, template)
            if found := judgeable(row):
                raise ValueError("; ".join(found))
        except ValueError as error:
            wrong += 1
            rejects.append({"where": where, "kind": "malformed", "reason": str(error)})
            if len(problems) < _SHOWN:
                problems.append(f"{where}: {error}")
            continue
        if len(prompt.ids) > max_prompt:
            reason = f"{len(prompt.ids)} tokens, more than data.max_prompt = {max_prompt}"
            rejects.append({"where": where, "kind": "too_long", "reason": reason})
            continue
        prompts.append(prompt)
        told.update(f"field {name}" for name in unread)
        told.update(f"column {name}" for name, value in row.items() if value is not None and name not in _COLUMNS)
        told.update(f"column {name}" for name in made.unused)
        if made.form != "messages":
            told[f"form {made.form}"] += 1
    if wrong and malformed == "error":
        problems.append(
            f"{setting}: {wrong} of {len(rows)} rows cannot be used; correct or remove them, "
            'or leave them out with data.malformed = "reject"'
        )
        raise UserError(problems)
    if not prompts:
        raise UserError(
            f"{setting}: none of the {len(rows)} rows can be used (the first: {rejects[0]['where']}: {rejects[0]['reason']}); "
            "raise data.max_prompt or give other rows"
        )
    return PromptSet(prompts, rejects, lines(told, Counter(), None, template, "leave"))


def _prompt(
    row: dict[str, Any], where: str, tokenizer: PreTrainedTokenizerFast, template: Template
) -> tuple[Prompt, frozenset[str]]:
    """The prompt of a row, and the fields of its messages that the template does not read.

    Raises:
        ValueError: a row of another form.
    """
    messages, given = conversation_of(row, row["messages"], training=False)
    if messages[-1]["role"] == "assistant":
        raise ValueError("its last message is the assistant's, so there is nothing to answer; leave that message out")
    ids, unread = prompt_of(messages, tokenizer, template, given)
    return Prompt(ids, messages, row.get("ground_truth"), row.get("dataset"), where), unread


class PromptStream:
    """Prompts without end, epoch upon epoch, each in a seeded order of its own; a function of nothing but the place.

    Args:
        count: prompts there are.
        seed: decides the order of every epoch.
        shuffle: otherwise file order.
    """

    def __init__(self, count: int, seed: int, shuffle: bool):
        self._count = count
        self._order = lru_cache(maxsize=2)(lambda epoch: epoch_order(count, seed, epoch, shuffle))

    def __getitem__(self, place: int) -> int:
        """Return the number of the prompt at a place, counted from 0."""
        epoch, at = divmod(place, self._count)
        return int(self._order(epoch)[at])
