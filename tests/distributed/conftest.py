"""What the distributed tests share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed import jobs, sft_runs, world
from tests.distributed.layouts import LR
from tests.distributed.truths import Truths


@pytest.fixture(scope="module")
def truth(tmp_path_factory):
    """Hugging Face's answers to each kind of Llama (tied or not), reduction and number of steps."""

    def answers(model: str, trained: str, reduction: str, steps: int):
        return world.run(1, jobs.hugging_face, model, reduction, steps, LR, trained)[0]

    return Truths(tmp_path_factory, jobs.make_model, answers)


@pytest.fixture(scope="session")
def material(tmp_path_factory) -> Path:
    """What `sft_runs.arguments` trains, and on what."""
    return sft_runs.make_material(tmp_path_factory.mktemp("sft_runs"))
