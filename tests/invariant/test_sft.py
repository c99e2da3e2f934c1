"""`tulu-mega sft` trains as it did when its trajectory was committed, on one rank and under tensor parallelism."""

from __future__ import annotations

import json

import pytest

from tests.invariant.stages import SFT


@pytest.mark.parametrize("layout", SFT.layouts)
def test_sft_trains_as_committed(tmp_path, layout):
    SFT.prepare(tmp_path)
    SFT.expect(SFT.trajectory(tmp_path, layout), json.loads(SFT.file.read_text()))
