"""Races of this project against its peers: the same model and texts, racers that wait for one another, alternating laps.

A racer is a set of processes (ranks) in one environment that stays up; see laps.py for its side. While one runs a lap the others
are stopped: gloo's threads, a dozen in a process, wake up a hundred times a second each. The environment of all of them is the
same: threads, OpenMP library, allocator.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from race.laps import MARK

ROOT = Path(__file__).parents[2]
OURS = Path(sys.executable)
PEERS = ROOT / ".venv-peers/bin/python"
IDLE = 0.03
"""Share of all cores in use below which the machine counts as idle."""
CALM = 0.06
"""Share of all cores that others may use during a lap that counts."""
SPARE = 3
"""Laps more than rounds that each racer has texts for, to run those again in which somebody else used the machine."""


@dataclass(frozen=True)
class Entry:
    """One side of a race."""

    name: str
    python: Path
    """interpreter of its environment"""
    script: str
    """under tools/race/"""
    setting: dict[str, Any]
    """what the script reads beside the texts; goes into the report"""
    ranks: int = 1
    rounds: int | None = None
    """fewer rounds than the others', for a side that takes long and is far behind"""
    lean: bool = False
    """whether freed memory goes back to the kernel at once, so that a peak is what is needed; slower"""

    @property
    def label(self) -> str:
        """The setting as a text."""
        cores = f"{self.ranks} ranks" if self.ranks > 1 else f"1 process on {cores_here()} threads"
        return ", ".join([cores, *(f"{name} {value}" for name, value in self.setting.items())])


@dataclass
class Racer:
    """An entry's processes, loaded and waiting."""

    entry: Entry
    processes: list[subprocess.Popen]
    log: Path
    facts: dict[str, Any] = field(default_factory=dict)
    laps: list[dict[str, Any]] = field(default_factory=list)
    """of rank 0"""

    @classmethod
    def start(cls, entry: Entry, spec: dict[str, Any], log: Path) -> Racer:
        """Starts the ranks; their errors go to the log.

        Raises:
            SystemExit: its environment is not there.
        """
        if not entry.python.exists():
            sys.exit(f"{entry.python} is not there; `make peers` builds it")
        command = [str(entry.python), str(ROOT / "tools/race" / entry.script), json.dumps({**spec, **entry.setting})]
        port, processes = _free_port(), []
        for rank in range(entry.ranks):
            with log.open("ab") as errors:
                processes.append(
                    subprocess.Popen(
                        command,
                        env=environment(entry, rank, port),
                        stdin=subprocess.PIPE,
                        stdout=subprocess.PIPE,
                        stderr=errors,
                        text=True,
                    )
                )
        racer = cls(entry, processes, log)
        try:
            racer.facts = racer._answers()[0]
            racer._signal(signal.SIGSTOP)
        except BaseException:
            racer.stop()
            raise
        return racer

    def lap(self) -> bool:
        """One lap; whether nobody else used the machine meanwhile."""
        self._signal(signal.SIGCONT)
        began, busy, used = time.monotonic(), _busy_seconds(), self._used_seconds()
        for process in self.processes:
            process.stdin.write("go\n")
            process.stdin.flush()
        record = self._answers()[0]
        others = (_busy_seconds() - busy - self._used_seconds() + used) / (time.monotonic() - began) / cores_here()
        self._signal(signal.SIGSTOP)
        self.laps.append({**record, "others": round(others, 3)})
        print(f"{self.entry.name} lap {len(self.laps)}: {record['seconds']:.2f} s, others {others:.1%}", file=sys.stderr)
        return others < CALM

    def stop(self) -> None:
        """Ends the processes."""
        self._signal(signal.SIGCONT)  # what they started is to notice that they are gone
        for process in self.processes:
            with contextlib.suppress(OSError):
                process.stdin.close()
        for process in self.processes:
            process.kill()
            process.wait()

    def _signal(self, number: int) -> None:
        """To the ranks and all that they started."""
        for process in self.processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                for each in _tree(process.pid):
                    with contextlib.suppress(psutil.NoSuchProcess):
                        each.send_signal(number)

    def _used_seconds(self) -> float:
        """CPU time of the ranks and of all that they started and that still runs."""
        trees = [tree for process in self.processes for tree in _tree(process.pid)]
        return sum(each.user + each.system for each in (process.cpu_times() for process in trees))

    def _answers(self) -> list[dict[str, Any]]:
        return [self._answer(process) for process in self.processes]

    def _answer(self, process: subprocess.Popen) -> dict[str, Any]:
        for line in process.stdout:
            if line.startswith(MARK):
                return json.loads(line.removeprefix(MARK))
        tail = "\n".join(self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-20:])
        sys.exit(f"{self.entry.name} ({self.entry.label}) ended with status {process.wait()}:\n{tail}")


def _tree(pid: int) -> list[psutil.Process]:
    root = psutil.Process(pid)
    return [root, *root.children(recursive=True)]


def environment(entry: Entry, rank: int, port: int) -> dict[str, str]:
    """Variables of one rank: the same OpenMP library and allocator on both sides, all cores shared out."""
    openmp = entry.python.parents[1] / "lib/libiomp5.so"
    variables = {
        "PYTHONPATH": f"{ROOT / 'tools/race'}{os.pathsep}{ROOT}",
        "OMP_NUM_THREADS": str(max(1, cores_here() // entry.ranks)),
        "LD_PRELOAD": str(openmp) if openmp.exists() else "",
        "KMP_BLOCKTIME": "1",  # a racer that waits for its next lap is to sleep
        # else glibc's allocator keeps what was freed: activations are not handed back and faulted in again at each step
        "MALLOC_MMAP_THRESHOLD_": str(2**16 if entry.lean else 2**32),
        "MALLOC_TRIM_THRESHOLD_": str(2**36),
        "MALLOC_TOP_PAD_": str(2**26),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "ACCELERATE_USE_CPU": "true",
    }
    if entry.ranks > 1 or entry.python == OURS:
        variables |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(entry.ranks),
            "LOCAL_WORLD_SIZE": str(entry.ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
    return os.environ | variables


def race(entries: Sequence[Entry], spec: dict[str, Any], rounds: int, log: Path) -> dict[str, Racer]:
    """One lap of warming up each, then `rounds` in which everyone runs one, in alternating order; disturbed ones once more.
    Tells of each lap on stderr.

    The texts are to last for ``1 + rounds + SPARE`` laps.
    """
    racers: list[Racer] = []
    try:
        for entry in entries:
            racers.append(Racer.start(entry, spec, log))
        spare = {racer.entry.name: SPARE for racer in racers}
        for number in range(rounds + 1):
            for racer in racers if number % 2 else reversed(racers):
                if racer.entry.rounds is not None and number > racer.entry.rounds:
                    continue
                while not racer.lap() and number and spare[racer.entry.name]:
                    spare[racer.entry.name] -= 1
    finally:
        for racer in racers:
            racer.stop()
    return {racer.entry.name: racer for racer in racers}


def counted(racer: Racer) -> list[int]:
    """Numbers of the laps that count: not the first, and the calm ones where there are any."""
    laps = range(1, len(racer.laps))
    return [number for number in laps if racer.laps[number]["others"] < CALM] or list(laps)


def rates(racer: Racer, amounts: Sequence[int]) -> list[float]:
    """Median, slowest and fastest amount a second of the laps that count.

    Args:
        amounts: of each lap, the first included.
    """
    found = [amounts[number] / racer.laps[number]["seconds"] for number in counted(racer)]
    return [round(of(found), 1 if max(found) > 10 else 3) for of in (statistics.median, min, max)]


def lap_ratios(racer: Racer, other: Racer) -> list[float]:
    """Median, least and greatest of the other's seconds over the racer's, lap by lap of those that count for both.

    A lap's number says which texts it trains, so this is of the same work on both sides.
    """
    common = sorted(set(counted(racer)) & set(counted(other)))
    found = [other.laps[number]["seconds"] / racer.laps[number]["seconds"] for number in common]
    return [round(of(found), 3) for of in (statistics.median, min, max)] if found else []


def calm(racer: Racer) -> dict[str, Any]:
    """How many laps count, and the most that anybody else used of the cores during one of them."""
    laps = counted(racer)
    return {"laps": len(laps), "others_share": max(racer.laps[number]["others"] for number in laps)}


def loss_gap(racer: Racer, truth: Racer) -> float:
    """Largest relative difference of a loss of the first lap."""
    got = [loss for lap in racer.laps for loss in lap["losses"]]  # a trainer tells a lap's last one in the next lap
    return round(max(abs(loss / want - 1) for loss, want in zip(got, truth.laps[0]["losses"], strict=False)), 7)


def wait_until_idle(limit: float) -> dict[str, Any]:
    """How busy the machine was before the race, and whether that is idle: waits up to `limit` seconds until it is.

    Load averages are told but not asked: they are of the minutes before.
    """
    deadline = time.monotonic() + limit
    while (busy := _busy_share()) > IDLE and time.monotonic() < deadline:
        pass
    load = [round(value, 2) for value in os.getloadavg()]
    return {"load_average_before": load, "busy_share_before": busy, "idle": busy <= IDLE}


def _busy_share(seconds: float = 2.0) -> float:
    """Share of all cores that anything used while we slept."""
    before = _busy_seconds()
    time.sleep(seconds)
    return round((_busy_seconds() - before) / seconds / cores_here(), 3)


def _busy_seconds() -> float:
    """CPU time of everything on this machine since it started, what its host took from it included."""
    fields = Path("/proc/stat").read_text().splitlines()[0].split()[1:]
    user, nice, system, _idle, _io, irq, softirq, stolen, *_ = map(int, fields)
    return (user + nice + system + irq + softirq + stolen) / os.sysconf("SC_CLK_TCK")


def cores_here() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
