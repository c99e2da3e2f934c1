"""What ranks are started with so that copies of tensors do not go through the cache."""

import platform
import subprocess
import sys
from pathlib import Path

import pytest

from tulu_mega.platforms.caches import memcpy_environment

LOADER = Path("/lib64/ld-linux-x86-64.so.2")
LIBRARY, VERSION = platform.libc_ver()
GLIBC = tuple(map(int, VERSION.split("."))) if LIBRARY == "glibc" else ()

on_x86_linux = pytest.mark.skipif(
    not sys.platform.startswith("linux") or platform.machine() != "x86_64", reason="glibc has this setting on x86-64 alone"
)


@pytest.fixture(autouse=True)
def _no_tunables(monkeypatch):
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)


@on_x86_linux
def test_three_quarters_of_what_linux_says(tmp_path):
    (tmp_path / "size").write_text("32768K\n")
    assert memcpy_environment(tmp_path / "size") == {"GLIBC_TUNABLES": "glibc.cpu.x86_non_temporal_threshold=25165824"}


@on_x86_linux
@pytest.mark.skipif(not LOADER.exists() or GLIBC < (2, 33), reason="glibc lists its tunables from 2.33 on")
def test_glibc_takes_it(tmp_path):
    (tmp_path / "size").write_text("2048K\n")
    environ = memcpy_environment(tmp_path / "size")
    listing = subprocess.run([LOADER, "--list-tunables"], env=environ, capture_output=True, text=True)
    assert listing.returncode == 0, listing.stderr
    assert "glibc.cpu.x86_non_temporal_threshold: 0x180000 " in listing.stdout


def test_what_the_user_set_stays(tmp_path, monkeypatch):
    (tmp_path / "size").write_text("32768K\n")
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.arena_max=1")
    assert memcpy_environment(tmp_path / "size") == {}


@pytest.mark.parametrize("text", [None, "", "32 MiB"])
def test_nothing_where_the_size_is_unknown(tmp_path, text):
    if text is not None:
        (tmp_path / "size").write_text(text)
    assert memcpy_environment(tmp_path / "size") == {}
