"""Holds what is there against what a run began with."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tulu_mega.errors import UserError, nearest
from tulu_mega.pins.record import Pin, Pins

_SHOWN = 5
_TAG = 10


@dataclass
class Pinning:
    """One start of a run: its pins, and what is to be accepted.

    Args:
        run_dir: of the run, for messages.
        pins: of the starts before; completed by this one.
        accept: names from the command line, each a setting (``model.path``), a section (``model``) or a setting with the change
            that is meant (``model.path@3f2a9c01aa``).
        old: the run began before there were pins.
    """

    run_dir: Path
    pins: Pins
    accept: Sequence[str] = ()
    old: bool = False
    notes: list[str] = field(default_factory=list)
    """lines to tell the user"""
    _used: set[str] = field(default_factory=set)
    _new: list[str] = field(default_factory=list)
    _unread: bool = False
    """whether the ranks are to look at something, and may find a change there"""

    def settle(self, setting: str, now: Pin, complete: Callable[[], Pin] | None = None, some: bool = False) -> None:
        """Pins what a setting names; where it is pinned already, sees whether it is the same.

        Args:
            setting: its dotted name.
            now: what is there. Parts without a digest are not looked at.
            complete: the same with every digest; asked for where there is a difference.
            some: only the parts that both have are compared.

        Raises:
            UserError: it is another content, and nobody accepts that.
        """
        before = self.pins.pins.get(setting)
        self._unread |= any(part.digest is None for part in now.parts.values())
        if before is None:
            self.pins.pins[setting] = now
            self._new.append(setting)
            return
        if differences(before, now, some):
            now = complete() if complete else now
            found = differences(before, now, some)
            if some:
                now.parts = {**before.parts, **now.parts}
            self._changed(setting, before, now, found)
            return
        for name, part in now.parts.items():
            held = before.parts.setdefault(name, part)
            held.digest = held.digest or part.digest
            held.saw(part.seen)
        before.given = now.given
        if all(part.digest for part in now.parts.values()):  # else the ranks still compare, and the advice names the old one
            before.revision = now.revision

    def _changed(self, setting: str, before: Pin, now: Pin, found: list[tuple[str, str]]) -> None:
        tag = hashlib.sha256("\n".join(sorted(key for key, _ in found)).encode()).hexdigest()[:_TAG]
        again = any(setting == record["setting"] for record in self.pins.accepted)
        told = [text for _, text in found]
        told = told if len(told) <= _SHOWN else [*told[:_SHOWN], f"and {len(told) - _SHOWN} more"]
        what = f"{setting} = {now.given}: is not what run_dir = {self.run_dir} began with: {'; '.join(told)}"
        name = self._accepted(setting, tag, again)
        if name is None:
            raise UserError(
                f"{what}{_revisions(before, now)}. Put back what was there, or choose another run_dir; if it was changed on "
                f"purpose, add --accept_changes {setting}{f'@{tag}' if again else ''}"
                + (" (the change itself is named, since one of this setting was accepted before)" if again else "")
            )
        when = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        self.pins.accepted.append({"setting": setting, "change": tag, "when": when, "by": name, "what": [t for _, t in found]})
        self.pins.pins[setting] = now
        self.notes.append(f"accepted by --accept_changes {name}: {what}")

    def _accepted(self, setting: str, tag: str, again: bool) -> str | None:
        """The name that accepts a change. One without the change counts once: it may have been left in a script."""
        for name in self.accept:
            named, at, change = name.partition("@")
            if (setting == named or setting.startswith(f"{named}.")) and (change == tag if at else not again):
                self._used.add(name)
                return name
        return None

    def ends(self) -> None:
        """Tells what was pinned late, and what there was nothing to accept of; once all is settled.

        Raises:
            UserError: a name that is to be accepted is nobody's.
        """
        known = list(self.pins.pins)
        for name in self.accept:
            if name in self._used:
                continue
            setting = name.partition("@")[0]
            if not any(each == setting or each.startswith(f"{setting}.") for each in known):
                pinned = f"{nearest(setting, known)}; pinned: {', '.join(known)}"
                raise UserError(f"accept_changes: {name!r} is nothing of this run{pinned}")
            if not self._unread:
                self.notes.append(f"warning: --accept_changes {name}: no such change is there to accept; leave it out")
        if self.old and self._new:
            self.notes.insert(
                0,
                f"run_dir = {self.run_dir}: begun before its inputs were pinned; pinned now, as they are: {', '.join(self._new)}",
            )


def differences(before: Pin, now: Pin, some: bool = False) -> list[tuple[str, str]]:
    """What is other than it was: a key for each difference, and what to say about it."""
    found = []
    for name in dict.fromkeys([*before.parts, *now.parts]):
        was, there = before.parts.get(name), now.parts.get(name)
        if was and there:
            if was.digest and there.digest and was.digest != there.digest:
                text = f"{was.shown} was {was.digest[:12]}, {there.shown} there is {there.digest[:12]}"
                found.append((f"{name}\t{there.digest}", text))
        elif was and not some:
            found.append((f"{name}\tgone", f"{was.shown} is gone"))
        elif there and not some:
            found.append((f"{name}\tnew\t{there.digest}", f"{there.shown} is new"))
    return found


def _revisions(before: Pin, now: Pin) -> str:
    if not before.revision or before.revision == now.revision:
        return ""
    return (
        f" (the hub's revision was {before.revision}, is {now.revision}; the directory that `hf download {before.given} "
        f"--revision {before.revision}` prints does in its place)"
    )
