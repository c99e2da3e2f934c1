"""What a program took between two looks at it."""

from __future__ import annotations

import socket
import subprocess
import sys

import pytest

from tulu_mega.rewards.sandboxed import starter

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="programs are judged on Linux alone")


@pytest.mark.parametrize(("mib", "why"), [(1, "time"), (3, "disk")])
def test_what_was_written_since_the_last_look_counts(tmp_path, monkeypatch, mib, why):
    """It was not looked at any more once its test had passed, so a quick one got its reward."""
    monkeypatch.setattr(starter, "_WATCH_S", 600.0)
    (tmp_path / "file").write_bytes(bytes(mib << 20))
    request = {"directory": str(tmp_path), "disk_mb": 2, "files": 100, "file_mb": 8, "threads": 64}
    ours, theirs = socket.socketpair(type=socket.SOCK_SEQPACKET)
    with ours, theirs:
        ours.send(starter._STOP)
        child = subprocess.Popen(["sleep", "600"])
        try:
            assert starter._watch(child.pid, theirs, request)["why"] == why
        finally:
            child.kill()
