"""What the distributed tests share."""

from __future__ import annotations

import pytest

from tests.distributed import jobs, world
from tests.distributed.layouts import LR, STEPS


@pytest.fixture(scope="module")
def truth(tmp_path_factory):
    """Hugging Face's answers, computed once for each kind of model (tied or not) and reduction."""
    made = {}

    def get(tied: bool, reduction: str):
        if (tied, reduction) not in made:
            root = tmp_path_factory.mktemp("truth")
            model, trained = str(root / "model"), str(root / "trained")
            world.run(1, jobs.make_model, model, tied)
            made[tied, reduction] = model, trained, world.run(1, jobs.hugging_face, model, reduction, STEPS, LR, trained)[0]
        return made[tied, reduction]

    return get
