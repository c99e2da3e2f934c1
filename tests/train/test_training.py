"""AdamW through megatron-core's optimizers against torch's AdamW on a Hugging Face model, clipping and schedule included."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.lib import jobs, world
from tests.lib.layouts import size, weights

pytestmark = pytest.mark.ranks

STEPS = 6
OPTIM = dict(lr=2e-3, schedule="linear", warmup=0.2, eps=1e-3, weight_decay=0.1, clip=1.0)
# eps well above the smallest gradients: Adam otherwise turns rounding into steps of the full rate


def reference(directory: str, steps: int) -> tuple[list[float], list[float], dict[str, np.ndarray]]:
    from transformers import AutoModelForCausalLM, get_scheduler

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    matrices = [p for p in model.parameters() if p.dim() > 1]
    norms = [p for p in model.parameters() if p.dim() == 1]  # megatron-core does not decay these, nor does transformers' Trainer
    groups = [{"params": matrices, "weight_decay": OPTIM["weight_decay"]}, {"params": norms, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=OPTIM["lr"], betas=(0.9, 0.999), eps=OPTIM["eps"])
    scheduler = get_scheduler("linear", optimizer, num_warmup_steps=2, num_training_steps=steps)
    losses, seen = [], []
    for step in range(steps):
        batch = jobs.sequences(model.config.vocab_size, seed=3 + step)
        optimizer.zero_grad()
        total = torch.zeros(())
        for sequence in batch:
            ids, labels = torch.tensor(sequence.input_ids), torch.tensor(sequence.labels)
            logits = model(ids[None]).logits[0, :-1]
            total = total + torch.nn.functional.cross_entropy(logits, labels[1:], reduction="sum", ignore_index=-100)
        (total / len(batch)).backward()
        seen.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIM["clip"])))
        losses.append(float(total) / len(batch))
        optimizer.step()
        scheduler.step()
    return losses, seen, {name: p.detach().numpy() for name, p in model.named_parameters()}


def ours(directory: str, layout: dict, dtype: str, out: str | None) -> tuple[list[float], list[float]]:
    from tulu_mega.config import OptimSettings
    from tulu_mega.objectives.sft import SftObjective

    with jobs.session(directory, layout, dtype) as made:
        made.engine.prepare_training(OptimSettings(**OPTIM), STEPS)
        losses, norms = [], []
        for step in range(STEPS):
            batch = jobs.share(made, jobs.sequences(made.engine.hf.vocab_size, seed=3 + step), 2)
            loss = made.engine.forward_backward(batch, SftObjective("sum"))
            update = made.engine.optimizer_step(step, loss.loss)
            losses.append(loss.loss)
            norms.append(update.grad_norm)
        if out:
            made.export(Path(out), torch.float32, {})
        return losses, norms


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = str(tmp_path_factory.mktemp("training") / "model")
    world.run(1, jobs.make_model, directory, False)
    return directory


@pytest.fixture(scope="module")
def truth(model):
    return world.run(1, reference, model, STEPS)[0]


LAYOUTS = [
    {"data": 2},
    {"data": 2, "distributed_optimizer": False},
    {"tensor": 2, "data": 2},
    {"tensor": 2, "pipeline": 2},
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_adamw_equals_torch(model, truth, tmp_path, layout):
    compare(model, truth, layout, tmp_path / "out")


def compare(model: str, truth, layout: dict, out: Path) -> None:
    """Losses, norms and trained weights."""
    losses, norms = world.run(size(layout), ours, model, layout, "fp32", str(out))[0]
    want_losses, want_norms, want = truth
    np.testing.assert_allclose(losses, want_losses, rtol=1e-5)
    np.testing.assert_allclose(norms, want_norms, rtol=1e-4)
    assert max(want_norms) > OPTIM["clip"]  # clipping took part
    got = weights(out)
    for name, value in want.items():
        assert np.linalg.norm(got[name] - value) / np.linalg.norm(value) < 1e-5, name


@pytest.mark.parametrize("layout", [{"tensor": 2}, {"data": 2}, {"pipeline": 2}, {"context": 2}], ids=str)
def test_bf16_follows_float32(model, truth, layout):
    """bf16 has 8 bits of mantissa: about 0.4% a rounding; float32 main parameters keep the errors from piling up."""
    losses, norms = world.run(2, ours, model, layout, "bf16", None)[0]
    np.testing.assert_allclose(losses, truth[0], rtol=1e-2)
    np.testing.assert_allclose(norms, truth[1], rtol=5e-2)
