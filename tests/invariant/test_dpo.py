"""`tulu-mega dpo` trains as it did when its trajectory was committed, on one rank and under context parallelism.

The second layout is left to the acceptance tests: tests/recipes/test_dpo.py has layouts of dpo beside one another.
"""

from __future__ import annotations

import json

import pytest

from tests.invariant.stages import DPO

REFERENCE, *OTHERS = DPO.layouts


@pytest.mark.parametrize("layout", [REFERENCE, *(pytest.param(other, marks=pytest.mark.acceptance) for other in OTHERS)])
def test_dpo_trains_as_committed(tmp_path, layout):
    DPO.prepare(tmp_path)
    DPO.expect(DPO.trajectory(tmp_path, layout), json.loads(DPO.file.read_text()))
