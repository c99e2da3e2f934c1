"""Work on rows in several processes: an interrupt ends it without a word from the workers."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

PROGRAM = """
import sys, time
from pathlib import Path
from tulu_mega.data.workers import in_order

DIRECTORY = Path(sys.argv[1])
if __name__ != "__main__":  # in a worker, which imports this file first
    (DIRECTORY / "began").touch()
    until = time.monotonic() + 60
    while not (DIRECTORY / "go").exists() and time.monotonic() < until:
        time.sleep(0.01)


def work(start, stop):
    return stop


if __name__ == "__main__":
    try:
        for _ in in_order(work, 40, 1, 2):
            pass
    except KeyboardInterrupt:
        sys.exit(130)
"""


def test_an_interrupt_of_the_terminal_makes_no_worker_speak(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.Popen(
        [sys.executable, str(program), str(tmp_path)], stderr=subprocess.PIPE, text=True, start_new_session=True, env=environment
    )
    until = time.monotonic() + 120
    while not (tmp_path / "began").exists():
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    (tmp_path / "go").touch()
    told = process.communicate(timeout=120)[1]
    assert process.returncode == 130 and "Traceback" not in told, told
