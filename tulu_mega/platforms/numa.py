"""A rank's threads stay on the CPUs next to its GPU: memory of the other socket is further from both.

torchrun's own `--numa-binding` does the same where numactl is installed, and ends the start where it is not.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

SWITCH = "TULU_MEGA_NUMA"
"""Environment variable: ``off`` leaves ranks on all CPUs that they were given."""


def bind(pci: tuple[int, int, int], system: Path = Path("/sys")) -> set[int]:
    """Bind this process's threads, and those that they start, to the CPUs of a device's NUMA node.

    Nothing happens where the machine has one node or does not tell, none of the node's CPUs may be used, or `SWITCH` says so.

    Args:
        pci: domain, bus and device number of the GPU.
        system: directory where the kernel describes its devices.

    Returns:
        The CPUs; none where nothing happened.
    """
    if os.environ.get(SWITCH, "").lower() in ("off", "0", "false") or not hasattr(os, "sched_setaffinity"):
        return set()
    domain, bus, device = pci
    try:
        node = int((system / f"bus/pci/devices/{domain:04x}:{bus:02x}:{device:02x}.0/numa_node").read_text())
        nodes = list((system / "devices/system/node").glob("node[0-9]*"))
        cpus = _listed((system / f"devices/system/node/node{node}/cpulist").read_text())
    except (OSError, ValueError):
        return set()
    allowed = os.sched_getaffinity(0)
    cpus &= allowed
    if len(nodes) < 2 or not cpus or cpus == allowed:
        return set()
    for thread in os.listdir("/proc/self/task"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            if os.sched_getaffinity(int(thread)) == allowed:  # else somebody has put it where it is
                os.sched_setaffinity(int(thread), cpus)
    return cpus


def _listed(text: str) -> set[int]:
    """
    >>> sorted(_listed("0-2,8\\n"))
    [0, 1, 2, 8]
    """
    found: set[int] = set()
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        found |= set(range(int(first), int(last or first) + 1))
    return found
