"""Rows to a store of tokens: encoded by worker processes, and once for all runs that share a cache."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from tulu_mega.config import DataSettings, ModelSettings
from tulu_mega.data.chat import template_of
from tulu_mega.data.encoding import ConversationEncoding, Encoded, Encoding, PairEncoding, supervised
from tulu_mega.data.forms.rated import Useless
from tulu_mega.data.json_text import readable_line
from tulu_mega.data.sources import Rows, load_rows
from tulu_mega.data.store import FILES, REJECTS, VERSION, Reject, RejectKind, TokenStore, growing, new_directory, refuse_strangers
from tulu_mega.data.tokenizer import load_tokenizer
from tulu_mega.data.told import end_tokens, lines
from tulu_mega.data.workers import cores, in_order
from tulu_mega.errors import UserError
from tulu_mega.pins.digest import digest

_CHUNK = 256
_SHOWN = 5
_VERIFIED = 1 << 30
"""Largest store in bytes that is read and verified at each use; larger ones are when `check --verify` asks for it."""
_ROWS_FOR_A_POOL = 4096
"""Smallest number of rows for which starting worker processes pays."""


@dataclass
class _Chunk:
    """The result of a chunk of rows."""

    tokens: list[np.ndarray] = field(default_factory=list)
    labels: list[np.ndarray] = field(default_factory=list)
    cuts: list[int] = field(default_factory=list)
    origins: list[tuple[int, int]] = field(default_factory=list)
    margins: list[float] = field(default_factory=list)
    rejects: list[Reject] = field(default_factory=list)
    told: Counter[str] = field(default_factory=Counter)
    ends: Counter[int] = field(default_factory=Counter)
    wrong: int = 0
    problems: list[str] = field(default_factory=list)


def prepare(
    data: DataSettings,
    model: ModelSettings,
    directory: str | Path,
    progress: bool = True,
    setting: str = "data.train",
    seen: Callable[[Rows], None] | None = None,
    day: str | None = None,
) -> TokenStore:
    """The tokenised rows of ``data.train``: what lies in the directory when it is up to date, else tokenised anew.

    Conversations, or pairs where the settings are of preference data. A model without a tokenizer does for rows that all have
    tokens already.

    With ``data.cache`` they are kept there, under a name made of their content, and the directory is a link to them. Runs that
    want the same rows at the same time wait for the first of them.

    Call it on one process, then :meth:`TokenStore.open` on the others.

    Args:
        setting: what names the rows, for messages.
        seen: called with the rows before anything is written; may raise UserError.
        day: that a chat template may write; see `load_tokenizer`.

    Raises:
        UserError: data or tokenizer are not to be used; everything that is found is told.
    """
    problems: list[str] = []
    rows = tokenizer = None
    kind = PairEncoding if data.pairs else ConversationEncoding
    try:
        split_setting = f"{setting.rpartition('.')[0]}.split"
        rows = load_rows(data.train, data.split, data.seed, setting, split_setting=split_setting)
        if seen:
            seen(rows)
    except UserError as error:
        problems += error.problems
    try:
        tokenizer = load_tokenizer(model.path, data.tokenizer, data.template, model.trust_remote_code, day=day)
    except UserError as error:
        if data.tokenizer or rows is None or data.format not in ("auto", "tokens") or not _all_tokenised(rows, kind):
            problems += error.problems
    if rows is None or problems:
        raise UserError(problems)
    template = template_of(tokenizer, data.template)
    how = (tokenizer, template, data.max_length, data.overlong, data.malformed, data.rewritten, data.format)
    encoding = kind(*how, data.turns, data.margin) if data.pairs else kind(*how)
    key = content_key(rows, encoding)
    directory = Path(directory)
    store = _up_to_date(directory, key)
    if store is not None:
        return store
    if data.cache is None:
        return build(directory, rows, encoding, key, data.workers, progress, setting)
    cached = Path(data.cache).expanduser() / key[:32]
    with _alone(cached):
        if _up_to_date(cached, key) is None:
            build(cached, rows, encoding, key, data.workers, progress, setting)
    _link(directory, cached)
    return TokenStore.open(directory)


def _all_tokenised(rows: Rows, kind: type[Encoding]) -> bool:
    for index in range(len(rows)):
        with suppress(ValueError):  # a line that cannot be read is told of when it is tokenised
            if not kind.tokenised(rows.row(index)):
                return False
    return True


def _up_to_date(directory: Path, key: str) -> TokenStore | None:
    try:
        store = TokenStore.open(directory)
    except UserError:
        return None
    if store.key != key:
        return None
    if damaged := store.damaged(_VERIFIED):
        print(f"{', '.join(damaged)}: not what was written there; tokenised anew", file=sys.stderr, flush=True)
        return None
    return store


@contextmanager
def _alone(cached: Path) -> Iterator[None]:
    """Hold the lock of a cached store: one process at a time tokenises it.

    A file system without locks costs no more than double work: the directories appear whole or not at all.
    """
    try:
        cached.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(cached.with_name(f".{cached.name}.lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise UserError(f"data.cache = {cached.parent}: cannot be written: {error.strerror or error}") from None
    try:
        with suppress(OSError):
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print("another run is tokenising the same data; waiting for it", file=sys.stderr, flush=True)
                fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _link(directory: Path, cached: Path) -> None:
    """Makes the directory a link to the cached one, in place of an older link or store."""
    refuse_strangers(directory)
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        temporary = directory.with_name(f".{directory.name}.{os.getpid()}.link")
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(cached.absolute(), target_is_directory=True)
        if not directory.is_symlink() and directory.exists():
            shutil.rmtree(directory)
        temporary.replace(directory)
    except OSError as error:
        raise UserError(f"{directory}: cannot be written: {error.strerror or error}") from None


def content_key(rows: Rows, encoding: Encoding) -> str:
    """Digest of all that decides the store: rows, tokenizer, template, length, what is left out, and this code's version."""
    tokenizer = encoding.tokenizer
    backend = eos = own = None
    if tokenizer is not None:
        backend, eos = tokenizer.backend_tokenizer.to_str(), tokenizer.eos_token
        own = [tokenizer.chat_template, tokenizer.special_tokens_map] if encoding.template == "tokenizer" else None
    parts = [VERSION, rows.fingerprint, backend, eos, own, encoding.width, *encoding.key()]
    return hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()


def build(
    directory: str | Path,
    rows: Rows,
    encoding: Encoding,
    key: str = "",
    workers: int | None = None,
    progress: bool = True,
    setting: str = "data.train",
) -> TokenStore:
    """Tokenises the rows into a new directory, which appears (or replaces an older one) only when complete.

    Args:
        directory: where to write.
        rows: what to tokenise.
        encoding: how.
        key: kept in the store, to tell later whether it is up to date.
        workers: processes; the cores this process may use when None. Few rows are done in this process.
        progress: draw a bar on stderr.
        setting: what names the rows, for messages.

    Raises:
        UserError: with the first malformed rows and their number where they are not to be left out, or when no row can be
            used.
    """
    target = Path(directory)
    with new_directory(target) as path:
        meta = _write(path, rows, encoding, workers or cores(), progress, setting)
        (path / "meta.json").write_text(json.dumps({"version": VERSION, "key": key, **meta}, indent=1), encoding="utf-8")
    return TokenStore.open(target)


def _write(path: Path, rows: Rows, encoding: Encoding, workers: int, progress: bool, setting: str) -> dict:
    lengths, counts, cuts, origins, margins, problems = [], [], [], [], [], []
    rejected: Counter[str] = Counter()
    told: Counter[str] = Counter()
    ends: Counter[int] = Counter()
    wrong = max_token = 0
    # a tokenizer class that came with the model cannot be unpickled in a fresh process
    portable = encoding.tokenizer is None or type(encoding.tokenizer).__module__.startswith("transformers.")
    if len(rows) < _ROWS_FOR_A_POOL or not portable:
        workers = 1
    with (
        growing(path / "tokens.npy") as tokens,
        growing(path / "labels.npy") as labels,
        open(path / REJECTS, "w", encoding="utf-8") as rejects,
        tqdm(
            total=len(rows),
            desc="tokenising",
            unit="row",
            file=sys.stderr,
            disable=not progress,
            mininterval=0.5 if sys.stderr.isatty() else 30.0,  # a log file keeps every state of the bar
            leave=False,
        ) as bar,
    ):
        for done, chunk in in_order(partial(_encode_rows, rows, encoding), len(rows), _CHUNK, workers):
            wrong += chunk.wrong
            told += chunk.told
            ends += chunk.ends
            problems += chunk.problems[: _SHOWN - len(problems)]
            for reject in chunk.rejects:
                rejected[reject.kind] += 1
                rejects.write(readable_line(reject._asdict()) + "\n")
            for ids, targets in zip(chunk.tokens, chunk.labels, strict=True):
                tokens.write(ids.tobytes())
                labels.write(targets.tobytes())
                lengths.append(len(ids))
                counts.append(supervised(targets))
                max_token = max(max_token, int(ids.max()), int(targets.max()))
            cuts += chunk.cuts
            origins += chunk.origins
            margins += chunk.margins
            bar.update(done)
    if wrong:
        if wrong > len(problems):
            problems.append(
                f"... {wrong} of {len(rows)} rows cannot be used; correct or remove them, "
                'or leave them out with data.malformed = "reject"'
            )
        raise UserError(problems)
    if not lengths:
        why = ", ".join(f"{count} {kind.replace('_', ' ')}" for kind, count in rejected.items())
        with open(path / REJECTS, encoding="utf-8") as first:
            reason = Reject(**json.loads(first.readline())).reason
        raise UserError(
            f"{setting}: none of the {len(rows)} rows can be used ({why}; at most {encoding.max_length} tokens each); "
            f"raise data.max_length or give other rows. The first: {reason}"
        )
    np.save(path / "offsets.npy", np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64))
    np.save(path / "supervised.npy", np.array(counts, np.int32))
    np.save(path / "cuts.npy", np.array(cuts, np.int32))
    np.save(path / "origins.npy", np.array(origins, np.int64))
    np.save(path / "margins.npy", np.array(margins, np.float64))
    return {
        "sequences": len(lengths),
        "width": encoding.width,
        "tokens": sum(lengths),
        "rejected": dict(rejected),
        "template": encoding.template,
        "told": lines(told, ends, encoding.tokenizer, encoding.template, encoding.rewritten),
        "ends": end_tokens(ends, encoding.tokenizer),
        "truncated": int(np.count_nonzero(cuts)),
        "max_token": max_token,
        "sources": rows.sources(),
        "digests": {name: digest(path / name) for name in FILES},
    }


def _encode_rows(rows: Rows, encoding: Encoding, start: int, stop: int) -> _Chunk:
    chunk = _Chunk()
    for index in range(start, stop):
        source, number = rows.origin(index)
        reject = partial(Reject, rows.parts[source].name, number)
        try:
            row = rows.row(index)
            (sequences, told), margin = encoding(row), encoding.margin(row)
        except Useless as error:
            chunk.rejects.append(reject("nothing_to_learn", str(error)))
            continue
        except ValueError as error:
            if encoding.malformed == "reject":
                chunk.rejects.append(reject("malformed", str(error)))
                continue
            chunk.wrong += 1
            if len(chunk.problems) < _SHOWN:
                chunk.problems.append(f"{rows.where(index)}: {error}")
            continue
        except UserError as error:
            raise UserError([f"{rows.where(index)}: {problem}" for problem in error.problems]) from None
        used = False
        for start_of_group in range(0, len(sequences), encoding.width):
            group = sequences[start_of_group : start_of_group + encoding.width]
            if refused := _refused(group, encoding):
                chunk.rejects.append(reject(*refused))
                continue
            used = True
            for ids, labels, cut, ends in group:
                chunk.tokens.append(ids)
                chunk.labels.append(labels)
                chunk.cuts.append(cut)
                chunk.origins.append((source, number))
                chunk.margins.append(margin)
                chunk.ends.update(ends)
        if used:
            chunk.told.update(told)
    return chunk


def _refused(group: list[Encoded], encoding: Encoding) -> tuple[RejectKind, str] | None:
    """Return the kind of reject and the reason why sequences that belong together are not used; None where they are."""
    longest = max(len(one.ids) + one.cut for one in group)
    if encoding.overlong == "reject" and longest > encoding.max_length:
        return "too_long", f"{longest} tokens, data.max_length is {encoding.max_length}"
    untrained = next((one for one in group if not supervised(one.labels)), None)
    if untrained is None:
        return None
    ids, cut = untrained.ids, untrained.cut
    kept = f" among the first {len(ids)} of its {len(ids) + cut}" if cut else ""
    return "nothing_to_train", f"no trained token{kept}"
