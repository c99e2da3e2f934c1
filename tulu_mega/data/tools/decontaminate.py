"""`tulu-mega data decontaminate`: training rows that hold evaluation rows (Tulu 3, arXiv 2411.15124, section 3.2).

A training row is contaminated when more than half of the words of an evaluation row lie in 8-grams that the training row holds
too. A set with more than 2 % of the rows of an evaluation in it is cleaned of its contaminated rows, or dropped. All three are
settings. Words are those of :func:`tulu_mega.data.tools.ngrams.words`; n-grams do not reach from one message or field into
another; evaluation rows of fewer words than an n-gram cannot be found, and are counted as `short`.
"""

from __future__ import annotations

import json
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from tulu_mega.config import DecontaminateSettings
from tulu_mega.data import compressed
from tulu_mega.data.forms.reading import any_messages
from tulu_mega.data.json_text import readable_line, told
from tulu_mega.data.sources import Rows, load_rows
from tulu_mega.data.tools.decontamination_report import MATCHES, REPORT, print_report
from tulu_mega.data.tools.ngrams import NgramIndex, words
from tulu_mega.data.workers import cores, in_order
from tulu_mega.errors import UserError

_CHUNK = 512
_SHOWN = 5
_REMEMBERED = 4096


@dataclass(frozen=True)
class Match:
    """A training row that holds rows of an evaluation."""

    row: int
    """number of the training row, counted from 0"""
    evaluation: int
    """number of the evaluation, counted from 0"""
    rows: np.ndarray
    """int64, numbers of the evaluation's rows, counted from 0"""
    shares: np.ndarray
    """share of each one's words that is held, 0..1"""


@dataclass
class _Chunk:
    matches: list[Match] = field(default_factory=list)
    unread: list[int] = field(default_factory=list)
    """rows of another form"""
    problems: list[str] = field(default_factory=list)


class Matcher:
    """Finds the evaluation rows that training rows hold.

    Args:
        texts: the words of each text of each row, for each evaluation.
        ngram: words in an n-gram.
        threshold: share of an evaluation row's words above which it counts as held.
    """

    def __init__(self, texts: Sequence[Sequence[Sequence[list[str]]]], ngram: int, threshold: float):
        self.index = NgramIndex((row for evaluation in texts for row in evaluation), ngram)
        self.begins = np.cumsum([0, *map(len, texts)])
        """int64, where in the index each evaluation begins, and the last ends"""
        self._threshold = threshold
        self._known: dict[bytes, list[tuple[int, np.ndarray, np.ndarray]]] = {}

    def __call__(self, rows: Sequence[Sequence[list[str]]], first: int = 0) -> list[Match]:
        """
        Args:
            rows: the words of each text of each training row.
            first: number of the first row.
        """
        return [Match(first + number, *match) for number, grams in self.index.find(rows) for match in self._held(grams)]

    def _held(self, grams: np.ndarray) -> list[tuple[int, np.ndarray, np.ndarray]]:
        key = grams.tobytes()
        if key not in self._known:  # rows of one template share their n-grams with the same evaluation rows
            if len(self._known) >= _REMEMBERED:
                self._known.clear()
            rows, shares = self.index.covered(grams, self._threshold)
            cuts = np.searchsorted(rows, self.begins)
            self._known[key] = [
                (number, rows[begin:end] - self.begins[number], shares[begin:end])
                for number, (begin, end) in enumerate(zip(cuts[:-1], cuts[1:], strict=True))
                if end > begin
            ]
        return self._known[key]


@dataclass(frozen=True)
class _Search:
    """The work of a worker process."""

    rows: Rows
    matcher: Matcher
    fields: list[str]
    roles: list[str]

    def __call__(self, start: int, stop: int) -> _Chunk:
        chunk, texts = _Chunk(), []
        for index in range(start, stop):
            try:
                texts.append(row_words(self.rows.row(index), self.fields, self.roles))
            except ValueError as error:
                texts.append([])
                chunk.unread.append(index)
                if len(chunk.problems) < _SHOWN:
                    chunk.problems.append(f"{self.rows.where(index)}: {error}")
        chunk.matches = self.matcher(texts, start)
        return chunk


def row_words(row: dict[str, Any], fields: Sequence[str], roles: Sequence[str]) -> list[list[str]]:
    """The words of each text in some fields of a row; see :func:`row_texts`."""
    return [words(text) for text in row_texts(row, fields, roles)]


def row_texts(row: dict[str, Any], fields: Sequence[str], roles: Sequence[str]) -> list[str]:
    """Each text in some fields of a row: text, lists of text, or the messages of some roles. A row of another form than messages
    has those that it is read as, a pair those of its prompt and of both answers.

    Raises:
        ValueError: a field is missing or something else.
    """
    texts = []
    for name in fields:
        value = row.get(name)
        if value is None and name == "messages":
            value = any_messages(row)
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, dict) and isinstance(item.get("role"), str):
                if item["role"] not in roles:
                    continue
                item = item.get("content")
            if not isinstance(item, str):
                if name not in row:
                    raise ValueError(f"has no field {name!r}, but {', '.join(map(str, list(row)[:8])) or 'nothing'}")
                raise ValueError(f"{name} holds {item!r:.60} ({type(item).__name__}); expected text, lists of text, or messages")
            texts.append(item)
    return texts


def decontaminate(settings: DecontaminateSettings) -> None:
    """Searches, reports, and writes what is left of the sets.

    Raises:
        UserError: with everything that is wrong with the files.
    """
    names, output = list(settings.evaluations), Path(settings.output).expanduser()
    evaluations, train = opened(settings)
    targets = _targets(train, output)
    matcher = Matcher(
        [
            _evaluation_words(rows, settings.evaluations[name], settings.roles)
            for name, rows in zip(names, evaluations, strict=True)
        ],
        settings.ngram,
        settings.threshold,
    )
    counts = [_Counts(len(names)) for _ in train.parts]
    changed: Counter[str] = Counter()
    unread: set[int] | None = set() if settings.malformed == "reject" else None
    try:
        output.mkdir(parents=True, exist_ok=True)
        partial = output / f".{MATCHES}.partial"
        with open(partial, "w", encoding="utf-8") as file:
            for match in _search(_Search(train, matcher, settings.fields, settings.roles), settings.workers or cores(), unread):
                part, line = train.origin(match.row)
                counts[part].add(match)
                best = int(np.argmax(match.shares))
                entry = {
                    "source": train.parts[part].name,
                    "line": line,
                    "evaluation": names[match.evaluation],
                    "evaluation_line": evaluations[match.evaluation].origin(int(match.rows[best]))[1],
                    "share": round(float(match.shares[best]), 4),
                    "evaluation_rows": len(match.rows),
                }
                file.write(readable_line(entry) + "\n")
        partial.replace(output / MATCHES)
        for row in unread or ():
            counts[train.origin(row)[0]].unread.add(row)
        sets = [
            _set(settings, part.name, len(part), counted, names, evaluations)
            for part, counted in zip(train.parts, counts, strict=True)
        ]
        ends = np.cumsum([0, *map(len, train.parts)])
        for number, entry in enumerate(sets):
            if entry["action"] == "clean" and entry["left"]:
                kept = (row for row in range(ends[number], ends[number + 1]) if row not in counts[number].left_out)
                _write(targets[number], _lines(train, kept, changed))
                entry["use"] = str(targets[number])
        report = {
            **settings.model_dump(include={"ngram", "threshold", "overlap", "fields", "roles"}),
            "evaluations": [
                {"source": name, "rows": len(rows), "short": int(np.count_nonzero(~matcher.index.matchable[begin:end]))}
                for name, rows, begin, end in zip(names, evaluations, matcher.begins[:-1], matcher.begins[1:], strict=True)
            ],
            "sets": sets,
        }
        (output / REPORT).write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"output = {settings.output}: cannot be written: {error.strerror or error}") from None
    for what in told(changed):
        print(f"warning: {what}", file=sys.stderr)
    print_report(report, output)


class _Counts:
    """Counts of what was found in a set."""

    def __init__(self, evaluations: int):
        self.contaminated: set[int] = set()
        """training rows"""
        self.unread: set[int] = set()
        """training rows that could not be read, so that nothing is known of them"""
        self.by_evaluation: list[set[int]] = [set() for _ in range(evaluations)]
        self.held: list[set[int]] = [set() for _ in range(evaluations)]
        """rows of each evaluation"""

    @property
    def left_out(self) -> set[int]:
        """Return the rows that a cleaned set leaves out."""
        return self.contaminated | self.unread

    def add(self, match: Match) -> None:
        self.contaminated.add(match.row)
        self.by_evaluation[match.evaluation].add(match.row)
        self.held[match.evaluation].update(match.rows.tolist())


def opened(settings: DecontaminateSettings) -> tuple[list[Rows], Rows]:
    """The evaluations' rows, and the training rows.

    Raises:
        UserError: with everything that cannot be opened.
    """
    problems: list[str] = []
    evaluations: list[Rows] = []
    train = None
    for name in settings.evaluations:
        try:
            where = {"setting": "evaluations", "split_setting": "evaluation_split"}
            evaluations.append(load_rows(name, settings.evaluation_split, **where))
        except UserError as error:
            problems += error.problems
    try:
        train = load_rows(settings.train, settings.split, setting="train", split_setting="split")
    except UserError as error:
        problems += error.problems
    if problems or train is None:
        raise UserError(problems)
    return evaluations, train


def check(settings: DecontaminateSettings, evaluations: list[Rows], train: Rows) -> None:
    """Check that every row has text in the named fields, and that the output can be written.

    Raises:
        UserError: with the first rows of each set that have none.
    """
    problems: list[str] = []
    for rows, fields in [*zip(evaluations, settings.evaluations.values(), strict=True), (train, settings.fields)]:
        named, wrong = [fields] if isinstance(fields, str) else fields, []
        for index in range(len(rows)):
            try:
                row_texts(rows.row(index), named, settings.roles)
            except ValueError as error:
                wrong.append(f"{rows.where(index)}: {error}")
        if rows is not train or settings.malformed == "error":
            problems += wrong[:_SHOWN] + [f"... {len(wrong)} of {len(rows)} rows"] * (len(wrong) > _SHOWN)
    try:
        _targets(train, Path(settings.output).expanduser())
    except UserError as error:
        problems += error.problems
    if problems:
        raise UserError(problems)


def _targets(train: Rows, output: Path) -> list[Path]:
    """A file for each set, of a name of its own; never one that is read."""
    read = {Path(part.name).absolute() for part in train.parts}
    taken: dict[str, int] = defaultdict(int)
    targets = []
    for part in train.parts:
        path = Path(part.name)
        stem = (path.with_suffix("") if path.suffix.lower() in compressed.SUFFIXES else path).stem
        taken[stem] += 1
        target = output / (f"{stem}.clean.jsonl" if taken[stem] == 1 else f"{stem}.{taken[stem]}.clean.jsonl")
        if target.absolute() in read:
            raise UserError(f"{part.name}: {target} is itself among the training files; choose another output")
        targets.append(target)
    return targets


def _evaluation_words(rows: Rows, fields: str | list[str], roles: Sequence[str]) -> list[list[list[str]]]:
    texts, problems = [], []
    for index in range(len(rows)):
        try:
            texts.append(row_words(rows.row(index), [fields] if isinstance(fields, str) else fields, roles))
        except ValueError as error:
            problems.append(f"{rows.where(index)}: {error}")
    if problems:
        raise UserError(problems[:_SHOWN] + [f"... {len(problems)} of {len(rows)} rows"] * (len(problems) > _SHOWN))
    return texts


def _search(search: _Search, workers: int, unread: set[int] | None) -> Iterator[Match]:
    """
    Args:
        unread: gets the rows that cannot be read; they are refused when there is no such set.

    Raises:
        UserError: rows that cannot be read.
    """
    problems, wrong = [], 0
    quiet = not sys.stderr.isatty()
    with tqdm(
        total=len(search.rows), desc="searching", unit="row", file=sys.stderr, mininterval=30 if quiet else 0.5, leave=False
    ) as bar:
        for done, chunk in in_order(search, len(search.rows), _CHUNK, workers):
            wrong += len(chunk.unread)
            if unread is not None:
                unread.update(chunk.unread)
            problems += chunk.problems[: _SHOWN - len(problems)]
            yield from chunk.matches
            bar.update(done)
    if wrong and unread is None:
        raise UserError(
            problems + [f"{wrong} of {len(search.rows)} rows cannot be read; correct or remove them, or give --malformed reject"]
        )


def _set(
    settings: DecontaminateSettings, name: str, rows: int, counts: _Counts, names: list[str], evaluations: list[Rows]
) -> dict[str, Any]:
    """What the report says of a set."""
    found = {
        evaluation: {
            "contaminated": len(mine),
            "held": len(held),
            "share": round(len(held) / len(all_), 6),
            "over": len(held) > settings.overlap * len(all_),
        }
        for evaluation, mine, held, all_ in zip(names, counts.by_evaluation, counts.held, evaluations, strict=True)
    }
    action = settings.action if any(entry["over"] for entry in found.values()) else "keep"
    left = {"clean": rows - len(counts.left_out), "drop": 0}.get(action, rows)
    return {
        "source": name,
        "rows": rows,
        "contaminated": len(counts.contaminated),
        "unread": len(counts.unread),
        "action": action,
        "left": left,
        "use": name if left else None,
        "evaluations": found,
    }


def _lines(rows: Rows, kept: Iterable[int], changed: Counter[str]) -> Iterator[bytes]:
    """The rows as lines of JSON.

    Raises:
        UserError: a row holds what cannot be written so.
    """
    for row in kept:
        try:
            yield rows.raw(row, changed)
        except ValueError as error:
            raise UserError(f"{rows.where(row)}: {error}") from None


def _write(target: Path, lines: Iterator[bytes]) -> None:
    partial = target.with_name(f".{target.name}.partial")
    with ExitStack() as stack:
        stack.callback(partial.unlink, missing_ok=True)
        with open(partial, "wb") as file:
            file.writelines(line + b"\n" for line in lines)
        partial.replace(target)
