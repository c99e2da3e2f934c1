"""What a rank may run on, as it sees it itself: the CPUs next to its GPU, by what the kernel tells of devices."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tulu_mega.platforms import numa

CPUS = sorted(os.sched_getaffinity(0))
pytestmark = pytest.mark.skipif(len(CPUS) < 2, reason="needs two CPUs")
RANK = """
import importlib.util, os, sys, threading
from pathlib import Path
spec = importlib.util.spec_from_file_location("numa", sys.argv[2])  # alone, without torch
numa = importlib.util.module_from_spec(spec); spec.loader.exec_module(numa)
early = threading.Event(); thread = threading.Thread(target=early.wait); thread.start()
bound = numa.bind((0, 0x5d, 0), Path(sys.argv[1]))
print(sorted(bound), sorted(os.sched_getaffinity(0)), sorted(os.sched_getaffinity(thread.native_id)))
early.set()
"""


def seen(system: Path, **environ: str) -> str:
    """What a process says of the CPUs it was bound to, its own, and those of a thread that it had before."""
    command = [sys.executable, "-I", "-S", "-c", RANK, str(system), numa.__file__]
    done = subprocess.run(command, env=os.environ | environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture
def system(tmp_path):
    """A machine of two sockets, the GPU at the second."""

    def write(name: str, text: str) -> None:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)

    write("bus/pci/devices/0000:5d:00.0/numa_node", "1\n")
    write("devices/system/node/node0/cpulist", f"{CPUS[0]}\n")
    write("devices/system/node/node1/cpulist", f"{CPUS[1]},{CPUS[-1] + 1}-{CPUS[-1] + 8}\n")
    return tmp_path


def test_a_rank_runs_next_to_its_gpu_unless_told_otherwise(system):
    assert seen(system) == f"[{CPUS[1]}] [{CPUS[1]}] [{CPUS[1]}]"
    assert seen(system, TULU_MEGA_NUMA="off") == f"[] {CPUS} {CPUS}"


def test_a_machine_that_does_not_tell_is_left_alone(system):
    before = os.sched_getaffinity(0)
    assert numa.bind((1, 2, 3), system) == set()  # no such device
    (system / "bus/pci/devices/0000:5d:00.0/numa_node").write_text("-1\n")
    assert numa.bind((0, 0x5D, 0), system) == set()
    (system / "bus/pci/devices/0000:5d:00.0/numa_node").write_text("0\n")
    (system / "devices/system/node/node0/cpulist").write_text(f"{CPUS[-1] + 1}\n")  # none of them is ours
    assert numa.bind((0, 0x5D, 0), system) == set()
    assert os.sched_getaffinity(0) == before
