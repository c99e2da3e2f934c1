"""Modules are imported without garbage collection, and a process ends without taking them apart."""

from __future__ import annotations

import contextlib
import gc
import importlib
import io
import os
import subprocess
import sys

import pytest

from tulu_mega.launch.launcher import resolve
from tulu_mega.process import uncollected


def test_nothing_is_collected_meanwhile(monkeypatch):
    gc.unfreeze()
    with uncollected():
        assert not gc.isenabled()
    assert gc.isenabled() and not gc.get_freeze_count(), "nothing was imported"
    monkeypatch.delitem(sys.modules, "this", raising=False)
    with uncollected(), contextlib.redirect_stdout(io.StringIO()):
        importlib.import_module("this")
        assert not gc.isenabled()
    assert gc.isenabled() and gc.get_freeze_count()
    with pytest.raises(ZeroDivisionError), uncollected():
        _ = 1 / 0
    assert gc.isenabled()
    gc.freeze()  # or else all collections to come go over what the other tests have imported


def test_whoever_has_turned_it_off_finds_it_off():
    gc.disable()
    try:
        assert resolve("json:dumps")([]) == "[]"
        assert not gc.isenabled()
    finally:
        gc.enable()


LEAVES = """
import atexit, sys, threading, time, types
from tulu_mega.process import leave

class Torn:
    def __del__(self):
        print("taken apart")

torn, first = Torn(), lambda: print("at exit")
atexit.register(first)
leaves = threading.Event()
threading.Thread(target=lambda: (leaves.wait(), time.sleep(0.3), print("thread"))).start()
sys.modules["torch"] = types.SimpleNamespace(cuda=types.SimpleNamespace(is_initialized=lambda: USED))
print("left")
leaves.set()
leave(STATUS)
"""
BUFFERED = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
"""The environment of a process in which `print` does not fail before its end."""


@pytest.mark.parametrize(("used", "end"), [(False, []), (True, ["taken apart"])])
def test_a_process_leaves_with_all_but_its_modules(used, end):
    code = LEAVES.replace("USED", str(used)).replace("STATUS", "3")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (3, "")
    assert done.stdout.splitlines() == ["left", "thread", "at exit", *end]


@pytest.mark.parametrize(("status", "told"), [(0, 120), (3, 3)])
def test_output_that_cannot_be_written_is_told(status, told):
    code = LEAVES.replace("USED", "False").replace("STATUS", str(status))
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-c", code], env=BUFFERED, stdout=full, stderr=subprocess.PIPE, timeout=60)
    assert done.returncode == told
    assert done.stderr.decode() == "error: standard output could not be written: No space left on device\n"


def test_output_that_nobody_reads_is_told_by_the_status():
    code = LEAVES.replace("USED", "False").replace("STATUS", "0")
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, "-c", code], env=BUFFERED, stdout=writer, stderr=subprocess.PIPE, timeout=60)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")
