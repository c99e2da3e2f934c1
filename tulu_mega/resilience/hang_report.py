"""What a rank knows of where it hangs, and what the ranks' accounts say together."""

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

_OURS = str(Path(__file__).parent)
_LIBRARY = str(Path("torch", "distributed"))


@dataclass(frozen=True)
class Collective:
    """What a rank waits in, as torch's flight recorder has it."""

    name: str
    group: str
    """torch's name of it, the same on all its ranks"""
    ranks: tuple[int, ...]
    """the group's"""
    number: int
    """of the group's collectives, from 1; 0 between two ranks"""

    def __str__(self) -> str:
        number = f" number {self.number}" if self.number else ""
        return f"{self.name}{number} of ranks {spelt(self.ranks)}" if self.ranks else f"{self.name}{number}"


@dataclass(frozen=True)
class Account:
    """What one rank says of itself."""

    at: str
    """what it is about, e.g. ``step 5: forward and backward``"""
    beat: int
    """grows while its process runs"""
    stack: str = ""
    """where its main thread is; empty while it makes progress"""
    waits: Collective | None = None
    begun: dict[str, int] = field(default_factory=dict)
    """of each group, by its name, the number of the last collective that this rank has come to"""

    def dumps(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def loads(cls, text: str | bytes) -> Account:
        values = json.loads(text)
        waits = values.pop("waits")
        return cls(**values, waits=waits and Collective(**waits | {"ranks": tuple(waits["ranks"])}))


def together(accounts: Mapping[int, Account], silent: Sequence[int]) -> list[str]:
    """The accounts as lines for people: first who is missing, then where the others are.

    Args:
        accounts: the last one of each rank that ever gave one.
        silent: ranks whose beat has not grown since.
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
    """Ranks in short: ``0-3, 7``."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def main_stack() -> str:
    """Where the main thread is: the function of torch.distributed that it has called, if any, and the nearest line of ours."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    return described(frame) if frame else "in no Python code"


def described(frame: FrameType) -> str:
    """See :func:`main_stack`."""
    inner, called, ours = frame, "", ""
    while frame and not ours:
        file = frame.f_code.co_filename
        if file.startswith(_OURS) and Path(file).name not in ("hang.py", "watchdog.py"):
            ours = f"{Path(file).relative_to(Path(_OURS).parent)}:{frame.f_lineno}"
        elif _LIBRARY in file and frame.f_code.co_name != "wrapper":
            called = frame.f_code.co_name  # the outermost: what was called
        frame = frame.f_back
    place = f"{inner.f_code.co_name} ({inner.f_code.co_filename}:{inner.f_lineno})"
    what = f"in torch.distributed's {called}" if called else f"in no collective but in {place}"
    return f"{what}, called from {ours}" if ours else what


def collectives(recorded: str | bytes, groups: Mapping[str, tuple[int, ...]]) -> tuple[Collective | None, dict[str, int]]:
    """Of what torch's flight recorder gives as JSON: the collective that has not ended, and how far each group has come.

    NCCL never marks what was sent and received in a batch as ended, only the entry behind, which stands for the batch
    (github.com/pytorch/pytorch/issues/137969).

    Args:
        groups: the ranks of each process group, by its name. Others are left out: what carries weights to servers is never
            marked as ended either.
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
