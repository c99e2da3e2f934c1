"""What can be wrong between machines, before a run starts on them: every problem names the node.

Every process of the world torchrun has made comes here; the first of each node speaks for it. They talk through the store alone,
so that a node which cannot reach another is told of and waited for no longer than its time-out; at the end all join in one sum.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import secrets
import shutil
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tulu_mega.bridge.files.hub import local_directory
from tulu_mega.cli import command_of
from tulu_mega.config import ModelSettings, RunSettings, Section
from tulu_mega.errors import UserError
from tulu_mega.launch import meeting, sameness
from tulu_mega.launch.launcher import joined_world
from tulu_mega.launch.run_dir import make_private
from tulu_mega.preflight import measure

PATIENCE = 60.0
"""Seconds a node may take to answer."""
SEEN_SECONDS = 10.0
"""That a network file system may take to show a file."""
SKEW = 2.0
"""Seconds that clocks may differ."""


@dataclass(frozen=True)
class Node:
    """One machine as the process that speaks for it sees it."""

    rank: int
    """rank of that process"""
    host: str
    same: dict[str, str]
    """values that have to be the same on every node, by name"""
    free_gib: float
    """where the run directory is"""
    clock: float = 0.0
    """seconds that it is ahead of the first node's"""
    unseen: tuple[str, ...] = ()
    """nodes whose file in the run directory it does not see"""
    unreachable: tuple[str, ...] = ()
    """nodes whose port it cannot reach"""
    ranks: int = 1
    """processes that drive a GPU there"""
    cpus: int = 1
    """CPUs that they may use"""

    @property
    def name(self) -> str:
        return f"node {self.host} (rank {self.rank})"


def problems(nodes: Sequence[Node], needed_gib: float = 0.0) -> list[str]:
    """What is wrong with nodes that are to work together.

    Args:
        needed_gib: gibibytes that the run will write.
    """
    found = sameness.differences({node.name: node.same for node in nodes})
    found += [
        f"{node.name}: its clock is {abs(node.clock):.1f} s {'ahead of' if node.clock > 0 else 'behind'} that of "
        f"{nodes[0].name}; keep clocks by NTP or chrony"
        for node in nodes
        if abs(node.clock) > SKEW
    ]
    for node in nodes:
        if node.unseen:
            found.append(
                f"{node.name}: a file that {', '.join(node.unseen)} wrote in run_dir is not seen there; run_dir has to be on a "
                "file system that all nodes share"
            )
        if node.unreachable:
            found.append(
                f"{node.name}: {', '.join(node.unreachable)} cannot be reached from there on a port that the kernel chose; "
                "open the ports between the nodes"
            )
        if node.cpus < node.ranks:
            found.append(
                f"{node.name}: its {node.ranks} processes may use {node.cpus} CPU(s) together; give the job's step all of "
                "the node's (srun --cpus-per-task, --cpu-bind=none; a container's limit)"
            )
        if node.free_gib < needed_gib:
            found.append(
                f"{node.name}: {node.free_gib:.1f} GiB are free at run_dir, checkpoints and export take about {needed_gib:.1f}; "
                "make room"
            )
    return found


def check(
    settings: Section, look: Callable[[], list[str]] = list, tell: Callable[[str], None] = lambda _line: None
) -> int:
    """Looks at every node of the world that torchrun's variables describe, all of whose processes call this.

    Args:
        look: what is wrong beside; called by the first process once the nodes go together, and the others wait for it.
        tell: is called, by the first process, with each line of what was measured.

    Returns:
        The nodes.

    Raises:
        UserError: on every process, with everything that is wrong.
    """
    if "RANK" not in os.environ:
        raise UserError(
            "check --cluster is for several machines: start it on each of them as the run, by examples/launch/torchrun.sh, "
            "ssh.sh or in the Slurm job"
        )
    command = command_of(settings)
    with meeting.refusing_together(os.environ):
        if command.world:
            joined_world(settings.parallel, os.environ)
    with meeting.met(os.environ) as nodes:  # what is wrong on one is told by all before they look
        nodes.agree(dict, None)
        return _check(settings, look, tell)


def _check(settings: Section, look: Callable[[], list[str]], tell: Callable[[str], None]) -> int:
    command = command_of(settings)
    rank, size, local = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    store, *_ = next(iter(dist.rendezvous("env://", rank, size)))
    store = dist.PrefixStore("tulu_mega/cluster", store)
    store.set_timeout(timedelta(seconds=PATIENCE))
    speakers = sorted(r for r, first in _gathered(store, "first", rank, range(size), local == 0).items() if first)
    found: list[str] = []
    if local == 0:
        run_dir = Path(settings.run_dir if command.stage else ".")
        node = _looked(_same(settings, settings.model if command.world else None), run_dir, store, rank, speakers)
        nodes = _gathered(store, "node", rank, speakers, asdict(node))
        needed = _needed_gib(settings) if command.stage else 0.0
        found = problems([Node(**nodes[each]) for each in speakers], needed)
    found = _told(store, "found", rank, size, lambda: found)
    if not found:
        found = _collective(store, rank, size, speakers, tell if rank == 0 else lambda _line: None)
    if not found:
        found = _told(store, "looked", rank, size, look)
    if found:
        raise UserError(found)
    return len(speakers)


def _told(store: dist.Store, name: str, rank: int, size: int, look: Callable[[], list[str]]) -> list[str]:
    """What the first process finds, however long that takes it."""
    if rank == 0:
        found = look()
        store.set(name, json.dumps(found))
    else:
        while True:
            try:
                store.wait([name], timedelta(seconds=PATIENCE))
                break
            except dist.DistStoreError:  # it is still looking
                continue
            except dist.DistError:
                raise UserError("the process of rank 0 is gone; look at its log") from None
        found = json.loads(store.get(name))
    store.set(f"{name}/{rank}", "")
    if rank == 0:  # the store may be this process's
        with contextlib.suppress(dist.DistError):
            store.wait([f"{name}/{each}" for each in range(size)], timedelta(seconds=10))
    return found


def _looked(same: dict[str, str], run_dir: Path, store: dist.Store, rank: int, speakers: Sequence[int]) -> Node:
    host = socket.gethostname()
    hosts = {each: f"{name} (rank {each})" for each, name in _gathered(store, "host", rank, speakers, host).items()}
    return Node(
        rank=rank,
        host=host,
        same=same,
        free_gib=shutil.disk_usage(_existing(run_dir)).free / 2**30,
        clock=_clock(store, rank, speakers),
        unseen=tuple(hosts[each] for each in _unseen(run_dir, store, rank, speakers)),
        **(
            {"ranks": int(os.environ["LOCAL_WORLD_SIZE"]), "cpus": len(os.sched_getaffinity(0))}
            if torch.cuda.is_available()
            else {}
        ),
        unreachable=tuple(hosts[each] for each in _unreachable(store, rank, speakers)),
    )


def _same(settings: Section, model: ModelSettings | None) -> dict[str, str]:
    """What has to be the same on every node, by name: packages, code, settings, the model that ranks build, devices."""
    same = {**sameness.of_program(), "Python": platform.python_version(), **sameness.of_settings(settings)}
    if model:
        directory = local_directory(model.path)
        config = directory / "config.json" if directory else None
        same[f"config.json of {model.path}"] = sameness.digest([config]) if config and config.is_file() else "not there"
    if torch.cuda.is_available():
        same |= {"CUDA": str(torch.version.cuda), "NCCL": ".".join(map(str, torch.cuda.nccl.version()))}
        same["GPUs"] = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}"
    return same


def _clock(store: dist.Store, rank: int, speakers: Sequence[int]) -> float:
    """How far this clock is ahead of the first speaker's: the middle of the quickest of five questions and answers."""
    if rank != speakers[0]:
        for turn in range(5):
            store.get(f"ask/{rank}/{turn}")
            store.set(f"tell/{rank}/{turn}", repr(time.time()))
        return float(store.get(f"ahead/{rank}"))
    for other in speakers[1:]:
        rounds = []
        for turn in range(5):
            began = time.time()
            store.set(f"ask/{other}/{turn}", "")
            theirs = float(store.get(f"tell/{other}/{turn}"))
            ended = time.time()
            rounds.append((ended - began, theirs - (began + ended) / 2))
        store.set(f"ahead/{other}", repr(min(rounds)[1]))
    return 0.0


def _unseen(run_dir: Path, store: dist.Store, rank: int, speakers: Sequence[int]) -> list[int]:
    """Speakers whose file this one does not see."""
    word = _gathered(store, "word", rank, speakers, secrets.token_hex(8))
    names = {each: run_dir / f".cluster_check_{word[each]}" for each in speakers}
    made = not run_dir.exists()
    with contextlib.suppress(OSError):
        make_private(run_dir)
        names[rank].write_text("")
    _gathered(store, "written", rank, speakers, True)
    end = time.monotonic() + SEEN_SECONDS
    while (missing := [each for each in speakers if not names[each].exists()]) and time.monotonic() < end:
        with contextlib.suppress(OSError):
            os.listdir(run_dir)  # lets an NFS client look again
        time.sleep(0.2)
    _gathered(store, "read", rank, speakers, True)
    with contextlib.suppress(OSError):
        names[rank].unlink()
        _gathered(store, "removed", rank, speakers, True)
        if made:
            run_dir.rmdir()
    return missing


def _unreachable(store: dist.Store, rank: int, speakers: Sequence[int]) -> list[int]:
    """Speakers that do not answer on a port of their own."""
    with socket.create_server(("", 0)) as listener:
        ports = _gathered(store, "port", rank, speakers, [_address(), listener.getsockname()[1]])
        missing = []
        for each in speakers:
            try:
                socket.create_connection(tuple(ports[each]), timeout=5).close()
            except OSError:
                missing.append(each)
        _gathered(store, "connected", rank, speakers, True)
    return missing


def _address() -> str:
    """This machine's address on the way to the rendezvous."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((os.environ["MASTER_ADDR"], 9))  # sends nothing
        return probe.getsockname()[0]


def _collective(store: dist.Store, rank: int, size: int, speakers: Sequence[int], tell: Callable[[str], None]) -> list[str]:
    """One sum over all processes by what will carry the run's collectives, and how fast they and the devices are."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    backend = "nccl" if cuda else "gloo"
    try:
        dist.init_process_group(
            backend, store=dist.PrefixStore(backend, store), rank=rank, world_size=size, timeout=timedelta(seconds=2 * PATIENCE)
        )
        total = torch.ones(1, device=device)
        dist.all_reduce(total)
        if int(total.item()) != size:
            raise RuntimeError(f"a sum of ones over {size} processes gave {total.item()}")
        measured = measure.measure(speakers, rank, size, device)
        dist.destroy_process_group()
    except (RuntimeError, OSError) as error:  # torch's own errors are of the first kind
        return [f"node {socket.gethostname()} (rank {rank}): a first sum over all processes by {backend} failed: {error}"]
    for line in measure.told(measured):
        tell(line)
    return measure.slow(measured, measure.GPU if cuda else measure.CPU)


def _gathered(store: dist.Store, name: str, rank: int, ranks: Sequence[int], value: Any) -> dict[int, Any]:
    """What each of the ranks gives, by rank.

    Raises:
        UserError: some did not answer; they are named.
    """
    store.set(f"{name}/{rank}", json.dumps(value))
    given, missing = {}, []
    end = time.monotonic() + PATIENCE
    for each in ranks:
        try:
            store.wait([f"{name}/{each}"], timedelta(seconds=max(0.1, end - time.monotonic())))
            given[each] = json.loads(store.get(f"{name}/{each}"))
        except dist.DistError:
            missing.append(each)
    if missing:
        raise UserError(
            f"rank(s) {', '.join(map(str, missing))} did not answer within {PATIENCE:.0f} s ({name}); look at their logs"
        )
    return given


def _needed_gib(settings: RunSettings) -> float:
    """About what the checkpoints that are still to come take, and the export; 0 where the model is not on this machine yet.

    A checkpoint has 14 bytes a parameter where the model's files have 2. A new one is whole before the oldest is removed.
    """
    model = local_directory(settings.model.path)
    if model is None:
        return 0.0
    weights = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    keep = settings.checkpoint.keep
    there = min(keep, sum(1 for _ in Path(settings.run_dir, "checkpoints").glob("step_*")))
    return ((keep + 1 - there) * 7 + 1) * weights / 2**30


def _existing(path: Path) -> Path:
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path
