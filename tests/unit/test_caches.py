"""What ranks are started with so that copies of tensors do not go through the cache."""

import platform
import subprocess
import sys

import pytest

from tulu_mega.platforms.caches import memcpy_environment

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux") or platform.machine() != "x86_64", reason="glibc has this setting on x86-64 alone"
)


@pytest.fixture(autouse=True)
def _no_tunables(monkeypatch):
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)


def test_three_quarters_of_what_linux_says(tmp_path):
    (tmp_path / "size").write_text("32768K\n")
    assert memcpy_environment(tmp_path / "size") == {"GLIBC_TUNABLES": "glibc.cpu.x86_non_temporal_threshold=25165824"}


def test_glibc_takes_it(tmp_path):
    (tmp_path / "size").write_text("2048K\n")
    listing = subprocess.run(
        ["/lib64/ld-linux-x86-64.so.2", "--list-tunables"],
        env=memcpy_environment(tmp_path / "size"),
        capture_output=True,
        text=True,
        check=False,
    )
    if "x86_non_temporal_threshold" not in listing.stdout:
        pytest.skip("this glibc does not list its tunables (before 2.33), or it is another C library")
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
