"""What a process is started with so that its C library knows how large the processor's cache is."""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path

_TUNABLES = "GLIBC_TUNABLES"
_LAST_CACHE = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")


def memcpy_environment(size_file: Path = _LAST_CACHE) -> dict[str, str]:
    """Lets glibc's `memcpy` write past the cache what would fill it: from three quarters of the cache on, as is glibc's own rule.

    In a virtual machine glibc may take the caches of the whole socket for one (256 MiB where Linux says 32). A tensor that is
    copied then goes through the cache, which reads every line before it is written: up to 1.6 times the time.

    Args:
        size_file: where Linux says how large the last cache is, such as ``32768K``.

    Returns:
        Variables for a new process; none where the user has set glibc's, or where the size is not known.
    """
    if not sys.platform.startswith("linux") or platform.machine() != "x86_64" or _TUNABLES in os.environ:
        return {}
    try:
        kib = int(size_file.read_text().strip().removesuffix("K"))
    except (OSError, ValueError):
        return {}
    return {_TUNABLES: f"glibc.cpu.x86_non_temporal_threshold={kib * 1024 * 3 // 4}"}
