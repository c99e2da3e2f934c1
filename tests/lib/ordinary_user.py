"""Commands run by an ordinary user, to whom the places that a test names are readable even beneath closed directories."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

NOBODY = 65534
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")


def words_before(*places: Path) -> list[str]:
    """Words before a command that has it run as nobody; skips the test where that cannot be arranged.

    In a mount namespace of its own every directory that is closed to others on the way to a place (such as /root, where Python
    may lie) is covered by an empty one, in which the place alone is found. Outside nothing changes.

    Args:
        places: directories that the command reads, beside this Python's.
    """
    if not (shutil.which("unshare") and shutil.which("setpriv")):
        pytest.skip("unshare and setpriv of util-linux are not here")
    prefixes = {sys.prefix, sys.exec_prefix, sys.base_prefix, sys.base_exec_prefix}
    wanted = sorted({Path(place).resolve() for place in (*prefixes, *places)})
    closed: dict[Path, list[Path]] = {}
    for place in wanted:
        for above in reversed(place.parents):
            if not above.stat().st_mode & 0o001:
                closed.setdefault(above, []).append(place)
                break
    steps = ["set -e"]
    for number, (above, inside) in enumerate(closed.items()):
        aside = f"/mnt/{number}"
        steps += ["mount -t tmpfs -o mode=755 none /mnt"] * (number == 0)
        for place, each in enumerate(inside):
            steps += [f"mkdir {aside}-{place} && mount --bind {shlex.quote(str(each))} {aside}-{place}"]
        steps += [f"mount -t tmpfs -o mode=755 none {shlex.quote(str(above))}"]
        for place, each in enumerate(inside):
            steps += [f"mkdir -p -m 755 {shlex.quote(str(each))} && mount --bind {aside}-{place} {shlex.quote(str(each))}"]
    steps += [f'exec setpriv --reuid {NOBODY} --regid {NOBODY} --clear-groups -- "$@"']
    words = ["unshare", "--mount", "sh", "-c", "\n".join(steps), "sh"]
    tried = subprocess.run([*words, sys.executable, "-c", "import json"], capture_output=True, text=True)
    if tried.returncode:
        pytest.skip(f"an ordinary user cannot be given this environment: {tried.stderr.strip()[-200:]}")
    return words


def open_to_all(directory: Path, above: Sequence[Path]) -> None:
    """Let everybody write into a directory, and enter those above it."""
    for each in above:
        each.chmod(each.stat().st_mode | 0o055)
    directory.chmod(0o777)
