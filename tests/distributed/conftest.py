"""What the distributed tests share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed import jobs, sft_runs
from tests.distributed.layouts import LR
from tests.distributed.truths import Truths


@pytest.fixture(scope="module")
def truth(tmp_path_factory):
    """Of each kind of Llama, tied or not."""
    return Truths.of_training(tmp_path_factory, jobs.make_model, LR)


@pytest.fixture(scope="session")
def material(tmp_path_factory) -> Path:
    """What `sft_runs.arguments` trains, and on what."""
    return sft_runs.make_material(tmp_path_factory.mktemp("sft_runs"))
