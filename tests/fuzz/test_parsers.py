"""Every parser of what others write: refuses what is no input of its own in its own words, at once.

`FUZZ_INPUTS` inputs of each (20,000) in acceptance, which prints a table; some of each in every run.
"""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.fuzz import answers, messages, model_files, rows, run_files
from tests.lib.fuzzing import Parser, fuzz

GROUPS: dict[str, Callable[[Path], dict[str, Parser]]] = {
    "answers": answers.parsers,
    "messages": messages.parsers,
    "model_files": model_files.parsers,
    "rows": rows.parsers,
    "run_files": run_files.parsers,
}
INPUTS, SEED = int(os.environ.get("FUZZ_INPUTS", "20000")), int(os.environ.get("FUZZ_SEED", "1"))
ONLY = os.environ.get("FUZZ_ONLY", "")
"""Part of the names of the parsers that are fed."""
FEW = 10


def kind(error: BaseException) -> str:
    """What an exception is, and the line of ours that it came from."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "/tulu_mega/" in frame.filename]
    where = f" in {Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
    return f"{type(error).__name__}{where}"


@pytest.fixture
def parsers(request, tmp_path) -> dict[str, Parser]:
    place = tmp_path / request.param
    place.mkdir()
    return GROUPS[request.param](place)


@pytest.mark.parametrize("parsers", GROUPS, indirect=True)
def test_a_few_changed_inputs_are_refused_in_the_parsers_own_words(parsers):
    found = {name: fuzz(parser, FEW, 0, kind).found for name, parser in parsers.items()}
    assert not {name: told for name, told in found.items() if told}


@pytest.mark.acceptance
@pytest.mark.alone
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("parsers", GROUPS, indirect=True)
def test_random_inputs_end_no_parser(parsers):
    wrong = {}
    print("\n| parser | inputs | refused | seconds | slowest, ms | found |\n| --- | ---: | ---: | ---: | ---: | --- |")
    for name, parser in parsers.items():
        if ONLY in name:
            tally = fuzz(parser, INPUTS, SEED, kind)
            figures = f"{tally.inputs:,} | {tally.refused:,} | {tally.seconds:.0f} | {1000 * tally.slowest:.0f}"
            print(f"| {name} | {figures} | {'; '.join(tally.found.values()) or 'nothing'} |", flush=True)
            wrong |= {name: tally.found} if tally.found else {}
    assert not wrong
