"""A disk that is full under a run's small files: told by name, and nothing is left half."""

from __future__ import annotations

import errno
import json
import resource
import signal
import tempfile

import pytest

from tulu_mega import cli
from tulu_mega.errors import UserError
from tulu_mega.launch import scratch
from tulu_mega.launch.run_files import Lines, write_whole
from tulu_mega.resilience.skipped_updates import SkippedUpdates


@pytest.fixture
def full():
    """No file may grow beyond 100 bytes: the system writes what fits and refuses the rest, as on a full disk."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


def test_a_line_is_in_the_file_whole_or_not_at_all(tmp_path, full):
    file = tmp_path / "logs/metrics.jsonl"
    with Lines(file) as lines:
        lines.append('{"step": 1}')
        with pytest.raises(UserError, match=r"metrics.jsonl could not be written: File too large; .* the same command again"):
            lines.append(json.dumps({"step": 2, "more": "x" * 100}))
        lines.append('{"step": 3}')
    assert file.read_text() == '{"step": 1}\n{"step": 3}\n'


def test_rows_of_skipped_updates_name_their_file(tmp_path, full):
    skipped = SkippedUpdates(5, tmp_path / "logs/skipped.jsonl")
    with pytest.raises(UserError, match=r"logs/skipped.jsonl could not be written"):
        skipped.note(False, 1, float("nan"), 1.0, lambda: [{"row": 7}] * 100, write=True)
    assert (tmp_path / "logs/skipped.jsonl").read_bytes() == b""


def test_a_file_that_was_there_stays(tmp_path, full):
    write_whole(tmp_path / "step_000001.jsonl", "old\n")
    with pytest.raises(UserError, match=r"step_000001.jsonl could not be written"):
        write_whole(tmp_path / "step_000001.jsonl", "new" * 100)
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == {"step_000001.jsonl": "old\n"}


@pytest.mark.parametrize(("number", "told"), [(errno.ENOSPC, "No space left on device"), (errno.EDQUOT, "quota")])
def test_a_full_disk_is_no_traceback_wherever_it_is_met(monkeypatch, capsys, number, told):
    def fail(_arguments):
        import os

        raise OSError(number, os.strerror(number), "RUN/data/rows.npy")

    monkeypatch.setattr(cli, "_dispatch", fail)
    assert cli.main(["sft"]) == 2
    line = capsys.readouterr().err
    assert line.startswith("error: RUN/data/rows.npy could not be written") and told in line and "make room" in line


def test_a_killed_launcher_s_folder_is_removed_by_the_next(tmp_path, monkeypatch):
    """Its own stays while it lives, and so does what is nobody's or too young to tell."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(scratch, "_FRESH", 0.0)
    left, foreign = tmp_path / "tulu_mega_ranks_left", tmp_path / "tulu_mega_ranks_foreign"
    for folder in (left, foreign):
        folder.mkdir()
    (left / ".lock").write_text("")
    (left / "rank_0.error.json").write_text("{}")
    with scratch.scratch() as ours:
        (ours / "kept").write_text("")
        with scratch.scratch() as another:
            assert another != ours and (ours / "kept").exists() and foreign.exists() and not left.exists()
    assert list(tmp_path.iterdir()) == [foreign]
