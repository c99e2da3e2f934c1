"""`tulu-mega dpo` trains as it did when its trajectory was committed, on one rank and under context parallelism."""

from __future__ import annotations

import json

import pytest

from tests.invariant.stages import DPO


@pytest.mark.parametrize("layout", DPO.layouts)
def test_dpo_trains_as_committed(tmp_path, layout):
    DPO.prepare(tmp_path)
    DPO.expect(DPO.trajectory(tmp_path, layout), json.loads(DPO.file.read_text()))
