"""Learning-rate schedules against transformers'."""

from __future__ import annotations

import pytest
import torch
from transformers import get_scheduler

from tulu_mega.config import OptimSettings


class Groups:
    """As much of an optimizer as a schedule sees."""

    def __init__(self):
        self.param_groups = [{"lr": 0.0, "weight_decay": 0.0}]


@pytest.mark.parametrize(("ours", "theirs"), [("linear", "linear"), ("cosine", "cosine"), ("constant", "constant_with_warmup")])
@pytest.mark.parametrize(("steps", "warmup"), [(100, 0.03), (37, 0.1), (10, 0.0), (1, 0.5)])
def test_schedule_is_that_of_transformers(ours, theirs, steps, warmup):
    from tulu_mega.train.optimizer import Schedule, warmup_steps

    schedule = Schedule(Groups(), OptimSettings(lr=1e-3, schedule=ours, warmup=warmup), steps)
    reference = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)
    scheduler = get_scheduler(theirs, reference, num_warmup_steps=warmup_steps(warmup, steps), num_training_steps=steps)
    for step in range(steps):
        assert schedule.set(step) == pytest.approx(reference.param_groups[0]["lr"], abs=1e-12)
        reference.step()
        scheduler.step()


def test_a_step_can_be_asked_for_in_any_order():
    from tulu_mega.train.optimizer import Schedule

    groups = Groups()
    schedule = Schedule(groups, OptimSettings(lr=1.0, schedule="linear", warmup=0.0), 10)
    assert [schedule.set(step) for step in (7, 0, 7)] == pytest.approx([0.3, 1.0, 0.3])
    assert groups.param_groups[0]["lr"] == pytest.approx(0.3)


def test_adam_keeps_step_in_the_group_and_equals_torch():
    from tulu_mega.platforms.adam import GroupStepAdam

    generator = torch.Generator().manual_seed(0)
    starts = [torch.randn(size, generator=generator) for size in (50, 7)]
    ours, theirs = ([torch.nn.Parameter(start.clone()) for start in starts] for _ in range(2))
    settings = dict(lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    a, b = GroupStepAdam(ours, **settings), torch.optim.AdamW(theirs, **settings)
    for _ in range(5):
        for x, y in zip(ours, theirs, strict=True):
            x.grad = torch.randn(x.shape, generator=generator)
            y.grad = x.grad.clone()
        a.step(), b.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)
    assert a.param_groups[0]["step"] == 5
    assert set(a.state[ours[0]]) == {"exp_avg", "exp_avg_sq"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_norm_of_all_gradients(dtype):
    """In float32 of gradients in bf16, too: what is clipped depends on it."""
    from tulu_mega.platforms.grad_norm import multi_tensor_l2norm

    gradients = [torch.randn(size, generator=torch.Generator().manual_seed(size)).to(dtype) for size in (50, 7, 1)]
    norm, each = multi_tensor_l2norm(2048, torch.zeros(1, dtype=torch.int32), [gradients], False)
    assert (norm.shape, norm.dtype, each) == ((1,), torch.float32, None)
    torch.testing.assert_close(float(norm), float(torch.cat(gradients).double().norm()), rtol=1e-6, atol=0)
