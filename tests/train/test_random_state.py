"""Every rank's random state is kept: with dropout, a run that goes on draws what it would have drawn."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.lib import jobs, world
from tests.lib.checkpoints import save

pytestmark = pytest.mark.ranks


def step(made, number: int) -> float:
    from tulu_mega.objectives.sft import SftObjective

    batch = jobs.share(made, jobs.sequences(made.engine.hf.vocab_size, seed=3 + number), 2)
    loss = made.engine.forward_backward(batch, SftObjective("sum"))
    made.engine.optimizer_step(number, loss.loss)
    return loss.loss


def going_on(model: str, directory: str) -> dict:
    """The third step's loss of a run, of the run put back to before it, and where an older checkpoint put it back to."""
    from tulu_mega.config import OptimSettings
    from tulu_mega.distributed import topology
    from tulu_mega.train import checkpoint

    with jobs.session(model, {"data": 2}, megatron={"hidden_dropout": 0.2}) as made:
        engine = made.engine
        engine.prepare_training(OptimSettings(lr=0.0), 9)
        step(made, 0), step(made, 1)
        states = [torch.get_rng_state()]
        save(engine, Path(directory), 2, {}, 9)
        losses = [step(made, 2)]
        (saved,) = checkpoint.find(Path(directory))
        checkpoint.restore({"model": engine}, saved)
        states.append(torch.get_rng_state())
        losses.append(step(made, 2))
        drawn = []
        for seed, done in ((1, 0), (1, 2), (1, 2), (1, 3), (2, 2)):
            topology.seed_ranks(seed, done)
            drawn.append(torch.rand(3).tolist())
        return {"losses": losses, "same": torch.equal(*states), "state": states[0].tolist(), "drawn": drawn}


def test_data_parallel_ranks_go_on_with_their_own(tmp_path, tiny):
    found = world.run(2, going_on, str(tiny), str(tmp_path / "checkpoints"))
    assert found[0]["state"] != found[1]["state"], "sequences of unlike lengths have drawn unlike many numbers"
    for rank in found:
        assert rank["same"] and rank["losses"][0] == rank["losses"][1]
        began, first, again, later, other = rank["drawn"]  # under another layout there is nothing to go on with
        assert first == again and len({tuple(each) for each in (began, first, later, other)}) == 4
    assert json.loads((tmp_path / "checkpoints/step_00000002/training.json").read_text())["random"] == "every rank's"
