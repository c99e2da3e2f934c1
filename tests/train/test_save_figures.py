"""What a save took is told in the line of its step."""

from __future__ import annotations

import errno
import io
import json
import os
import threading

import numpy as np
import pytest

from tulu_mega.train import save_figures
from tulu_mega.train.save_figures import SaveFigures, SaveWatch, tell

TOLD = {"save_seconds": 2.0, "save_waited_seconds": 0.5, "save_memory_gib": 3.0}


def figures(step: int, memory: int | None = 3 * 2**30) -> SaveFigures:
    return SaveFigures(step, 2.0, 0.5, memory)


def lines(*steps: int) -> str:
    return "".join(json.dumps({"step": step, "loss": 1.5, "lr": "NaN"}) + "\n" for step in steps)


@pytest.mark.parametrize("saved", [1, 2, 3])
def test_a_save_is_told_in_the_line_of_its_step_while_others_follow(tmp_path, saved):
    file = tmp_path / "metrics.jsonl"
    file.write_text(lines(1, 2, 3))
    with open(file, "a") as log:
        tell(file, figures(saved))
        log.write(lines(4))
    found = [json.loads(line) for line in file.read_text().splitlines()]
    assert [row["step"] for row in found] == [1, 2, 3, 4]
    for row in found:
        told = TOLD if row["step"] == saved else {}
        assert row == {"step": row["step"], "loss": 1.5, "lr": "NaN", **told}


def test_a_step_that_is_saved_twice_has_the_figures_of_the_last(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text(lines(1, 2))
    tell(file, SaveFigures(1, 2.123456789, 0.512345678, 3 * 2**30 + 12345))
    tell(file, figures(1))
    first, second = (json.loads(line) for line in file.read_text().splitlines())
    assert first == {"step": 1, "loss": 1.5, "lr": "NaN", **TOLD} and second["step"] == 2


def test_where_the_system_tells_no_memory_seconds_are_told_alone(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text(lines(1))
    tell(file, figures(1, None))
    assert json.loads(file.read_text()).keys() == {"step", "loss", "lr", "save_seconds", "save_waited_seconds"}


@pytest.mark.parametrize("content", ["", lines(1), '{"step": 2, "lo', "[]\n"])
def test_without_a_line_of_the_step_nothing_is_told(tmp_path, content):
    file = tmp_path / "metrics.jsonl"
    file.write_text(content)
    tell(file, figures(2))
    assert file.read_text() == content


class Full(io.FileIO):
    """A file on a disk that takes ten bytes of what is written first."""

    full = False

    def write(self, data) -> int:
        if not self.full:
            self.full = True
            super().write(data[:10])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write(data)


def test_a_disk_that_is_full_leaves_the_lines_as_they_were(tmp_path, capsys, monkeypatch):
    file = tmp_path / "metrics.jsonl"
    file.write_text(lines(1, 2))
    monkeypatch.setattr(save_figures, "open", lambda path, *_, **__: Full(path, "r+"), raising=False)
    tell(file, figures(1))
    assert file.read_text() == lines(1, 2)
    assert "warning: step 1: what its save took cannot be added" in capsys.readouterr().err


class Process:
    """A process whose memory is what a test says, told to every look at it."""

    def __init__(self, memory: int | None):
        self.memory, self.looks = memory, 0
        self.looked = threading.Condition()

    def __call__(self) -> int | None:
        with self.looked:
            self.looks += 1
            self.looked.notify_all()
            return self.memory

    def holds(self, memory: int) -> None:
        """Holds it until the watch has looked once more."""
        with self.looked:
            self.memory, seen = memory, self.looks
            assert self.looked.wait_for(lambda: self.looks > seen, timeout=60)


def test_the_watch_keeps_the_peak_and_the_seconds_that_training_waited(monkeypatch):
    process = Process(1000)
    monkeypatch.setattr(save_figures, "resident_memory", process)
    monkeypatch.setattr(save_figures, "most_memory", lambda: 5000)
    watch = SaveWatch()
    with watch.waiting():
        process.holds(1064)
    process.holds(900)
    seconds, waited, memory = watch.end()
    assert 0 < waited <= seconds
    assert memory == 64


@pytest.mark.parametrize(("most", "told"), [((2000, 2300), 1300), ((2000, 2000), 64)])
def test_a_peak_above_all_before_is_the_kernels(monkeypatch, most, told):
    process = Process(1000)
    monkeypatch.setattr(save_figures, "resident_memory", process)
    monkeypatch.setattr(save_figures, "most_memory", iter(most).__next__)
    watch = SaveWatch()
    process.holds(1064)
    assert watch.end()[2] == told


def test_where_the_system_tells_no_memory_the_watch_says_so(monkeypatch):
    monkeypatch.setattr(save_figures, "resident_memory", Process(None))
    assert SaveWatch().end()[2] == -1


def test_resident_memory_is_what_the_process_holds():
    before = save_figures.resident_memory()
    if before is None:
        pytest.skip("the system does not tell")
    held = np.ones(64 * 2**20)  # 512 MiB
    assert save_figures.resident_memory() - before > held.nbytes / 2
