"""`tulu-mega grpo` with a real server trains as it did when its trajectory was committed, on one rank and on a pipeline.

All runs attach to one server, whose start is what costs most here; the second layout is left to the acceptance tests.
"""

from __future__ import annotations

import json

import pytest

from tests.invariant.server import served
from tests.invariant.stages import GRPO

REFERENCE, *OTHERS = GRPO.layouts


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A prepared directory, and flags and environment variables of the runs there."""
    pytest.importorskip("vllm")
    directory = tmp_path_factory.mktemp("grpo")
    GRPO.prepare(directory)
    with served(directory) as (flags, variables):
        yield directory, flags, variables


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("layout", [REFERENCE, *(pytest.param(other, marks=pytest.mark.acceptance) for other in OTHERS)])
def test_grpo_trains_as_committed(server, layout):
    directory, flags, variables = server
    GRPO.expect(GRPO.trajectory(directory, layout, *flags, **variables), json.loads(GRPO.file.read_text()))
