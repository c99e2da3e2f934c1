"""The files of models that one process does not read before the start: the ranks share them among themselves.

Each file is read once, by one rank of those that see it, and lies in the page cache when its tensors are loaded. Nodes that see
other files at the same place (file systems of their own) read theirs, and have to find the same in them.
"""

from __future__ import annotations

import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch.distributed as dist

from tulu_mega.bridge.files.hub import model_directory
from tulu_mega.distributed.collectives import from_lead, gathered, together
from tulu_mega.errors import UserError
from tulu_mega.pins import directories
from tulu_mega.pins.compare import Pinning
from tulu_mega.pins.digest import Stamp, read, stamp
from tulu_mega.pins.record import PINS, Part, Pin, Pins

Key = tuple[str, str]
"""A setting, and a file's name."""
Stamps = Mapping[Key, Stamp]
Read = Mapping[Key, tuple[str, Stamp | None]]


def settle(run_dir: Path, accept: Sequence[str], local_rank: int, at: Callable[[str], None]) -> None:
    """Reads what has no digest yet, or another stamp than any that was seen, and completes the run's pins. Every rank calls it.

    Args:
        accept: see `Pinning`.
        local_rank: 0 speaks for its node.
        at: told of progress.

    Raises:
        UserError: on every rank, when something is another content than the run began with, or than another node has.
    """
    pins = _on_lead(lambda: Pins.read(run_dir), "RUN_DIR/pins.json could not be read")
    named = {name: pin for name, pin in pins.pins.items() if pin.directory} if pins else {}
    if not named:
        return
    at("reading what the run depends on")
    paths: dict[Key, Path] = {}
    here: Stamps | None = None
    with together("what the run depends on could not be read"):
        for setting, pin in named.items():
            held = directories.files(model_directory(pin.given), code=True)
            paths |= {(setting, name): path for name, path in held.items() if name in pin.parts}
        if local_rank == 0:
            here = {key: stamp(path) for key, path in paths.items()}
    told = gathered((here, socket.gethostname()))
    nodes = _nodes([stamps for stamps, _ in told])
    groups = _groups(nodes)
    mine = groups[nodes[dist.get_rank()][0]]
    unknown = sorted(key for key, now in nodes[dist.get_rank()][1].items() if not _known(named, key, now))
    found: dict[Key, tuple[str, Stamp | None]] = {}
    with together("what the run depends on could not be read"):
        for key in unknown[mine.index(dist.get_rank()) :: len(mine)]:
            at(f"reading {key[1]}")
            found[key] = read(paths[key])
    everywhere = gathered(found)
    with together(f"{run_dir / PINS} could not be written"):
        if dist.get_rank() == 0:
            contents = {}
            for first, ranks in groups.items():
                read_there = {key: each for rank in ranks for key, each in everywhere[rank].items()}
                contents[first] = _content(named, nodes[first][1], read_there)
            _settle(run_dir, pins, accept, contents, {first: told[first][1] for first in groups})


def known(run_dir: Path, setting: str) -> dict[str, str]:
    """Digests by file of what a setting names, as pinned; none where nothing is. Every rank calls it."""
    pins = _on_lead(lambda: Pins.read(run_dir), "RUN_DIR/pins.json could not be read")
    pin = pins.pins.get(setting) if pins else None
    return {name: part.digest for name, part in pin.parts.items() if part.digest} if pin else {}


def _on_lead(work: Callable[[], Pins | None], what: str) -> Pins | None:
    """What rank 0 gets, on every rank."""
    value = None
    with together(what):
        if dist.get_rank() == 0:
            value = work()
    return from_lead(value)


def _nodes(told: Sequence[Stamps | None]) -> list[tuple[int, Stamps]]:
    """For each rank, the first rank of its node's group and the node's stamps; a node's ranks lie behind one another."""
    found: list[tuple[int, Stamps]] = []
    first: dict[int, Stamps] = {}
    for rank, stamps in enumerate(told):
        if stamps is None:
            found.append(found[-1])
            continue
        same = next((lead for lead, seen in first.items() if seen == stamps), None)
        if same is None:
            first[same := rank] = stamps
        found.append((same, stamps))
    return found


def _groups(nodes: Sequence[tuple[int, Stamps]]) -> dict[int, list[int]]:
    """The ranks of nodes that see the same files, by the first of them."""
    groups: dict[int, list[int]] = {}
    for rank, (first, _) in enumerate(nodes):
        groups.setdefault(first, []).append(rank)
    return groups


def _known(named: Mapping[str, Pin], key: Key, now: Stamp) -> bool:
    part = named[key[0]].parts[key[1]]
    return part.digest is not None and now in part.seen


def _content(named: Mapping[str, Pin], stamps: Stamps, found: Read) -> dict[str, Pin]:
    """What a group of nodes sees, by setting."""
    content = {
        setting: Pin(pin.given, {}, True, directories.revision(model_directory(pin.given))) for setting, pin in named.items()
    }
    for (setting, name), now in stamps.items():
        digest, seen = found.get((setting, name), (named[setting].parts[name].digest, now))
        content[setting].parts[name] = Part(f"{name} ({now.size:,} bytes)", digest, [seen] if seen else [])
    return content


def _settle(
    run_dir: Path, pins: Pins, accept: Sequence[str], contents: Mapping[int, Mapping[str, Pin]], hosts: Mapping[int, str]
) -> None:
    """On rank 0: the first node's content against the pins, that of the others against the first's."""
    pinning = Pinning(run_dir, pins, accept)
    problems = []
    first, *others = contents
    for setting, now in contents[first].items():
        try:
            pinning.settle(setting, now)
        except UserError as error:
            problems += error.problems
    for node in others:
        for setting, there in contents[node].items():
            reference = contents[first][setting]
            odd = [
                name
                for name, part in reference.parts.items()
                if name not in there.parts or there.parts[name].digest != part.digest
            ]
            if odd:
                problems.append(
                    f"{setting} = {there.given}: on {hosts[node]} {', '.join(odd[:5])} is not what it is on {hosts[first]}; "
                    "copy it there"
                )
                continue
            for name in reference.parts:
                pinning.pins.pins[setting].parts[name].saw(there.parts[name].seen)
    if problems:
        raise UserError(problems)
    pins.write(run_dir)
    for note in pinning.notes:
        print(note, file=sys.stderr, flush=True)
