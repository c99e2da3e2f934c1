"""Reads and checks the prompts of a run: each can be rendered, judged, and answered within the model's length."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tulu_mega.config import PolicyRunSettings
from tulu_mega.data.chat import Template, template_of
from tulu_mega.data.json_text import readable_line
from tulu_mega.data.messages import NOTHING
from tulu_mega.data.prompts import PromptSet, read_prompts
from tulu_mega.data.sources import load_rows
from tulu_mega.data.stops import stop_ids
from tulu_mega.data.template_form import form_of
from tulu_mega.data.tokenizer import load_tokenizer
from tulu_mega.data.told import form_lines
from tulu_mega.errors import UserError
from tulu_mega.launch.run_files import named, write_whole
from tulu_mega.rewards.registry import Judge
from tulu_mega.rl.judging import reward_spec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

REJECTS = "rejects.jsonl"


@dataclass(frozen=True)
class Prompts:
    """The prompts of a run."""

    train: PromptSet
    heldout: PromptSet | None
    tokenizer: PreTrainedTokenizerFast
    template: Template
    """template by which the prompts were made"""
    ends: tuple[int, ...]
    """tokens that end a response"""
    told: list[str]
    """parts of the rows that are not used, a line each"""
    verifiers: list[str]
    """names of the verifiers that the rows need"""
    sources: dict[str, list[dict[str, Any]]]
    """for each setting the sources of its rows, as :meth:`tulu_mega.data.sources.Rows.sources` has them"""
    rejects: Path
    """file that lists the rows which are not used"""


def read(settings: PolicyRunSettings, day: str | None = None) -> Prompts:
    """Read the rows that `data.train` and `heldout.data` name.

    Args:
        day: of the run's first start; see `load_tokenizer`.

    Raises:
        UserError: all problems of data, verifiers and tokenizer, by file and line.
    """
    data, problems = settings.data, []
    tokenizer = load_tokenizer(settings.model.path, data.tokenizer, data.template, settings.model.trust_remote_code, day=day)
    template = template_of(tokenizer, data.template)
    judge, needed = Judge(reward_spec(settings.rewards)), set()

    def judgeable(row: dict[str, Any]) -> list[str]:
        found = judge.check(row)
        if not found:
            names = row["dataset"]
            needed.update(judge.resolve(name) for name in ([names] if isinstance(names, str) else names))
        return found

    wanted = [("data.train", data.train, data.split)]
    if settings.heldout:
        wanted.append(("heldout.data", settings.heldout.data, settings.heldout.split))
    sets: dict[str, PromptSet] = {}
    drawn: dict[str, list[dict[str, Any]]] = {}
    for setting, sources, split in wanted:
        try:
            split_setting = f"{setting.rpartition('.')[0]}.split"
            rows = load_rows(sources, split, data.seed, setting, split_setting=split_setting)
            drawn[setting] = rows.sources()
            how = (data.max_prompt, data.malformed, judgeable, setting, data.format)
            sets[setting] = read_prompts(rows, tokenizer, template, *how)
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError(problems)
    rejects = Path(settings.run_dir) / "data" / REJECTS
    # a tokenizer of another model has other numbers than those that the model's files name
    ends = stop_ids(tokenizer, template, None if data.tokenizer else settings.model.path)
    told = [f"{setting}: {line}" for setting, prompts in sets.items() for line in prompts.told]
    told += [f"{setting}: {line}" for setting, prompts in sets.items() for line in _unserved(judge, prompts)]
    told += form_lines(form_of(tokenizer, NOTHING)) if template == "tokenizer" else []
    heldout = sets.get("heldout.data")
    return Prompts(sets["data.train"], heldout, tokenizer, template, ends, told, sorted(needed), drawn, rejects)


def _unserved(judge: Judge, prompts: PromptSet) -> list[str]:
    """Return a line about tests that need objects, which the verifier of programs does not serve; none where there are no such
    tests."""
    asked = [(prompt.where, judge.unserved(prompt.dataset, prompt.ground_truth)) for prompt in prompts.prompts]
    found = [f"{', '.join(names)} in {where}" for where, names in asked if names]
    if not found:
        return []
    return [
        f"tests of {len(found):,} rows make objects of the program's classes ({found[0]}), which are not served: they fail, "
        "counted as unserved; rewards.code_objects = true serves them"
    ]


def write_rejects(prompts: Prompts) -> None:
    """Write the rows that are not used, with the reason for each, to :attr:`Prompts.rejects`."""
    with named(prompts.rejects):
        prompts.rejects.parent.mkdir(parents=True, exist_ok=True)
    lines = [*prompts.train.rejects, *(prompts.heldout.rejects if prompts.heldout else ())]
    text = "".join(readable_line(line) + "\n" for line in lines)
    write_whole(prompts.rejects, text)
