"""`tulu-mega grpo` with a real server trains as it did when its trajectory was committed, on one rank and on a pipeline.

All runs attach to the one server of runs of grpo, whose start costs most; the second layout is left to the acceptance tests.
"""

from __future__ import annotations

import json

import pytest

from tests.invariant.stages import GRPO

pytestmark = pytest.mark.servers

REFERENCE, *OTHERS = GRPO.layouts


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A directory of what the runs read."""
    directory = tmp_path_factory.mktemp("grpo")
    GRPO.prepare(directory)
    return directory


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("layout", [REFERENCE, *(pytest.param(other, marks=pytest.mark.acceptance) for other in OTHERS)])
def test_grpo_trains_as_committed(prepared, served, layout):
    flags, variables = served
    GRPO.expect(GRPO.trajectory(prepared, layout, *flags, **variables), json.loads(GRPO.file.read_text()))
