"""Explains a hang: each rank accounts for where it is, and the accounts together name the rank that the others wait for."""

from __future__ import annotations

import json
import sys
import threading
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

_PACKAGE = Path(__file__).parents[1]
_LIBRARY = str(Path("torch", "distributed"))


@dataclass(frozen=True)
class Collective:
    """A collective that a rank waits in, from torch's flight recorder."""

    name: str
    group: str
    """torch's name of the group, the same on all its ranks."""
    ranks: tuple[int, ...]
    """Ranks of the group."""
    number: int
    """Sequence number among the group's collectives, from 1; 0 for a message between two ranks."""

    def __str__(self) -> str:
        number = f" number {self.number}" if self.number else ""
        return f"{self.name}{number} of ranks {spelt(self.ranks)}" if self.ranks else f"{self.name}{number}"


@dataclass(frozen=True)
class Account:
    """One rank's account of where it is."""

    at: str
    """Last mark of the rank, e.g. ``step 5: forward and backward``."""
    beat: int
    """A count that grows while the process runs."""
    stack: str = ""
    """Place of the main thread; empty while the rank makes progress."""
    waits: Collective | None = None
    begun: dict[str, int] = field(default_factory=dict)
    """By name of the group, the number of the last collective that the rank has come to."""

    def dumps(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def loads(cls, text: str | bytes) -> Account:
        values = json.loads(text)
        waits = values.pop("waits")
        return cls(**values, waits=waits and Collective(**waits | {"ranks": tuple(waits["ranks"])}))


def together(accounts: Mapping[int, Account], silent: Sequence[int]) -> list[str]:
    """Describe the accounts in lines for people: first the ranks that are missing, then where the others are.

    Args:
        accounts: the last account of each rank that ever gave one.
        silent: ranks whose beat has stopped growing.
    """
    lines = []
    for rank in silent:
        last = f"; last heard of in {accounts[rank].at!r}" if rank in accounts else ""
        lines.append(f"rank {rank} does not answer: stopped, swapped out or dead{last}")
    missing: dict[tuple[Collective, int], list[int]] = defaultdict(list)
    for rank, account in accounts.items():
        if rank not in silent and account.waits:
            for member in account.waits.ranks:
                came = accounts[member].begun.get(account.waits.group, 0) if member in accounts else 0
                if member != rank and account.waits.number and (member in silent or came < account.waits.number):
                    missing[account.waits, member].append(rank)
    lines += [
        f"rank {member} has not come to {what}, where {_ranks(waiting)} wait{'s' * (len(waiting) == 1)}"
        for (what, member), waiting in missing.items()
    ]
    places: dict[str, list[int]] = defaultdict(list)
    for rank, account in accounts.items():
        if rank not in silent:
            places[_place(account)].append(rank)
    return lines + [f"{_ranks(ranks)}: {place}" for place, ranks in places.items()]


def _place(account: Account) -> str:
    if not account.stack:
        return f"not stuck, in {account.at!r}"
    return f"in {account.at!r}, {f'waiting in {account.waits}, ' if account.waits else ''}{account.stack}"


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {spelt(ranks)}"


def spelt(ranks: Sequence[int]) -> str:
    """Spell ranks in short: ``0-3, 7``."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def main_stack() -> str:
    """Return where the main thread is: the function of torch.distributed that it called, if any, and our nearest line."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    return described(frame) if frame else "in no Python code"


def described(frame: FrameType) -> str:
    """See :func:`main_stack`."""
    inner, called, ours = frame, "", ""
    while frame and not ours:
        file = frame.f_code.co_filename
        if Path(file).is_relative_to(_PACKAGE) and Path(file).name not in ("hang_report.py", "watchdog.py"):
            ours = f"{Path(file).relative_to(_PACKAGE.parent)}:{frame.f_lineno}"
        elif _LIBRARY in file and frame.f_code.co_name != "wrapper":
            called = frame.f_code.co_name  # the outermost frame: the function that was called
        frame = frame.f_back
    place = f"{inner.f_code.co_name} ({inner.f_code.co_filename}:{inner.f_lineno})"
    what = f"in torch.distributed's {called}" if called else f"in no collective but in {place}"
    return f"{what}, called from {ours}" if ours else what


def collectives(recorded: str | bytes, groups: Mapping[str, tuple[int, ...]]) -> tuple[Collective | None, dict[str, int]]:
    """Parse the flight recorder's JSON: return the pending collective and the last sequence number of each group.

    NCCL never marks the messages of a batch as ended, only the entry behind them, which stands for the whole batch
    (github.com/pytorch/pytorch/issues/137969).

    Args:
        groups: the ranks of each process group, by its name. The pending collective is looked for in these alone: the groups
            that carry weights to servers never mark theirs as ended.
    """
    found: dict[str, Any] = json.loads(recorded)
    begun: dict[str, int] = {}
    waits = None
    entries = found.get("entries", ())
    ended, batches = [False] * len(entries), {}
    for at, entry in reversed(list(enumerate(entries))):
        group = entry["process_group"][0]
        if entry["profiling_name"].endswith(":coalesced"):
            batches[group] = entry["retired"]
        ended[at] = entry["retired"] or (entry["is_p2p"] and batches.get(group, False))
    for entry, over in zip(entries, ended, strict=True):
        group = entry["process_group"][0]
        number = 0 if entry["is_p2p"] else entry["collective_seq_id"]
        if number:
            begun[group] = max(begun.get(group, 0), number)
        if not over and group in groups:
            waits = waits or Collective(entry["profiling_name"], group, groups[group], number)
    return waits, begun
