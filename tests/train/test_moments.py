"""AdamW with moments in bf16: the rounding, the mathematics under layouts, checkpoints, and bytes."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from tests.lib import jobs, world
from tests.lib.layouts import size
from tulu_mega.train.rounded_adam import Box, RoundedAdam, _rows, noise, rounded, thresholds


def bits(box: Box) -> torch.Tensor:
    return noise(box, _rows(box), torch.device("cpu"))


def test_a_rounded_value_is_a_neighbour_and_right_on_average():
    values = torch.tensor([1.0 + 2**-9, -3.14159, 1e-20, 5.0, 0.0, -0.0, 123456.0])
    box = Box("weight", (20000, len(values)), (0, 0), (20000, len(values)))
    seen = rounded(values.expand(20000, -1).contiguous(), thresholds(bits(box), 5)).double()
    for column, value in zip(seen.t(), values.double(), strict=True):
        below, above = column.min(), column.max()
        ulp = 2.0 ** (math.floor(math.log2(abs(value))) - 7) if value else 0.0
        assert below <= value <= above and above - below <= ulp
        assert abs(column.mean() - value) <= 5 * ulp / 2 / math.sqrt(20000)


def test_bits_are_those_of_the_place_whoever_holds_it():
    whole = bits(Box("w", (3, 6, 10), (1, 0, 0), (1, 6, 10)))
    for corner, sizes in [((1, 0, 0), (1, 3, 10)), ((1, 3, 0), (1, 3, 10)), ((1, 0, 5), (1, 6, 5)), ((1, 2, 3), (1, 1, 4))]:
        (_, row, column), (_, rows, columns) = corner, sizes
        part = bits(Box("w", (3, 6, 10), corner, sizes))
        assert torch.equal(part, whole[row : row + rows, column : column + columns])
    others = [bits(Box("v", (3, 6, 10), (1, 0, 0), (1, 6, 10))), bits(Box("w", (3, 6, 10), (2, 0, 0), (1, 6, 10)))]
    for other in others:  # of another tensor or layer
        assert (other != whole).all()
    assert torch.equal(bits(Box("w", (3, 9, 10), (1, 0, 0), (1, 6, 10))), bits(Box("w", (3, 9, 10), (1, 0, 0), (1, 9, 10)))[:6])


def test_bits_are_even_and_of_neighbours_independent():
    found = bits(Box("w", (400, 500), (0, 0), (400, 500)))
    lanes = [((found >> shift) & 1).double() for shift in range(32)]
    for lane in lanes:
        assert abs(lane.mean() - 0.5) < 5 * 0.5 / math.sqrt(found.numel())
    for a, b in [(found[1:], found[:-1]), (found[:, 1:], found[:, :-1]), (found, found >> 16)]:
        halves = torch.stack([(a & 0xFFFF).double().flatten(), (b & 0xFFFF).double().flatten()])
        assert abs(torch.corrcoef(halves)[0, 1]) < 5 / math.sqrt(found.numel())


def test_an_element_s_thresholds_fill_the_range_evenly():
    """Of n steps each part of the range has its share, within a few, wherever an element begins."""
    begin = bits(Box("w", (50, 1), (0, 0), (50, 1))).flatten()
    seen = torch.stack([thresholds(begin, step) for step in range(1000)])
    assert seen.min() >= 0 and seen.max() <= 0xFFFF
    for share in (0.1, 0.25, 0.5, 0.9):
        assert ((seen < share * 65536).sum(0) - 1000 * share).abs().max() < 5


def test_the_second_moment_does_not_stand_still():
    """To the nearest it would: each step moves it by less than half the distance of its neighbours."""
    p = torch.nn.Parameter(torch.zeros(4096))
    ours = RoundedAdam([{"params": [p], "lr": 0.0, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}],
                       {p: [Box("w", (4096,), (0,), (4096,))]})  # fmt: skip
    nearest = torch.zeros(4096)
    for step in range(1500):
        p.grad = torch.full((4096,), 2.0 if step < 500 else 1.0)
        ours.step()
        nearest = (0.999 * nearest + 0.001 * p.grad**2).bfloat16().float()
    want = 1 + (4 * (1 - 0.999**500) - 1) * 0.999**1000
    kept = ours.state[p]["exp_avg_sq"].double()
    assert kept.mean() == pytest.approx(want, rel=0.002)
    assert (kept / want - 1).abs().max() < 2**-6  # two or four neighbours
    assert abs(nearest[0].item() / want - 1) > 0.1


def test_it_follows_torchs_adamw():
    generator = torch.Generator().manual_seed(0)
    starts = [torch.randn(size, generator=generator) for size in (500, 70)]
    ours, theirs = ([torch.nn.Parameter(start.clone()) for start in starts] for _ in range(2))
    settings = dict(lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    places = {p: [Box(str(at), tuple(p.shape), (0,), tuple(p.shape))] for at, p in enumerate(ours)}
    a, b = RoundedAdam([{"params": ours, **settings}], places), torch.optim.AdamW(theirs, **settings)
    for _ in range(40):
        for x, y in zip(ours, theirs, strict=True):
            x.grad = torch.randn(x.shape, generator=generator)
            y.grad = x.grad.clone()
        a.step(), b.step()
    for x, y, start in zip(ours, theirs, starts, strict=True):
        assert torch.linalg.norm(x - y) < 0.01 * torch.linalg.norm(y - start)
    assert a.param_groups[0]["step"] == 40
    again = RoundedAdam([{"params": ours, **settings}], places)
    again.load_state_dict(a.state_dict())
    assert again.param_groups[0]["step"] == 40
    for p in ours:
        assert all(torch.equal(again.state[p][name], a.state[p][name]) for name in a.state[p])
        assert {value.dtype for value in again.state[p].values()} == {torch.bfloat16}


def test_shards_are_rounded_as_the_whole():
    """Cut within a row, as a distributed optimizer cuts: an element's moments are those that another layout would keep."""
    generator = torch.Generator().manual_seed(1)
    settings = dict(lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    shape = (60, 10)
    start = torch.randn(shape, generator=generator)
    first = [Box("w", shape, (0, 0), (20, 10)), Box("w", shape, (20, 0), (1, 4))]
    second = [Box("w", shape, (20, 4), (1, 6)), Box("w", shape, (21, 0), (39, 10))]
    shards = [(start, [Box("w", shape, (0, 0), shape)]), (start.flatten()[:204], first), (start.flatten()[204:], second)]
    parameters = [torch.nn.Parameter(values.clone()) for values, _ in shards]
    made = [RoundedAdam([{"params": [p], **settings}], {p: boxes}) for p, (_, boxes) in zip(parameters, shards, strict=True)]
    for _ in range(5):
        grads = torch.randn(shape, generator=generator)
        for p, part, optimizer in zip(parameters, (grads, grads.flatten()[:204], grads.flatten()[204:]), made, strict=True):
            p.grad = part.clone()
            optimizer.step()
    for name in ("exp_avg", "exp_avg_sq"):
        whole, *parts = (optimizer.state[p][name].flatten() for p, optimizer in zip(parameters, made, strict=True))
        same = torch.cat(parts) == whole
        assert same.float().mean() > 0.98, name  # a last bit of float32 may turn a rounding


def series(layout: dict, model: str, first: int = 0, last: int = jobs.RUN, folder=None, form="reshardable", moments="bf16"):
    ranks = world.run(size(layout), jobs.series, model, layout, first, last, folder, None, "fp32", None, form, moments)
    return ranks[-1]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = str(tmp_path_factory.mktemp("moments") / "model")
    world.run(1, jobs.make_model, directory, True)
    return directory


@pytest.fixture(scope="module")
def alone(model):
    return series({}, model)


MORE = pytest.mark.acceptance
OVERLAP = {"overlap_grad_reduce": True, "overlap_param_gather": True}


@pytest.mark.ranks
@pytest.mark.parametrize(
    "layout",
    [
        {"tensor": 2, "data": 2, **OVERLAP},
        pytest.param({"data": 2}, marks=MORE),
        pytest.param({"tensor": 2, "pipeline": 2}, marks=MORE),
        pytest.param({"pipeline": 2, "virtual_pipeline": 2}, marks=MORE),
        pytest.param({"context": 2, "tensor": 2}, marks=MORE),
    ],
    ids=str,
)
def test_layouts_agree(model, alone, layout):
    """As near as with moments in float32: rounding does not depend on who holds an element."""
    np.testing.assert_allclose(series(layout, model), alone, rtol=1e-4)
    assert alone != series({}, model, moments="fp32")


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("before", "after", "form"),
    [
        ({"tensor": 2, "pipeline": 2}, {}, "reshardable"),
        pytest.param({"data": 2}, {"data": 2}, "same_layout", marks=MORE),
        pytest.param({}, {"tensor": 2, "data": 2}, "reshardable", marks=MORE),
    ],
    ids=str,
)
def test_a_run_goes_on_in_any_layout(model, alone, tmp_path, before, after, form):
    folder = str(tmp_path)
    done = series(before, model, 0, 2, folder, form) + series(after, model, 2, jobs.RUN, folder, form)
    np.testing.assert_allclose(done, alone, rtol=1e-4)


def bytes_of_state(model: str, layout: dict, dtype: str) -> tuple[int, int]:
    """Parameters of this rank, and the bytes of all that its optimizer keeps."""
    from tulu_mega.config import OptimSettings

    with jobs.session(model, layout, dtype) as made:
        made.engine.prepare_training(OptimSettings(moments="bf16"), 1)
        batch = jobs.share(made, jobs.sequences(made.engine.hf.vocab_size), 1)
        from tulu_mega.objectives.sft import SftObjective

        loss = made.engine.forward_backward(batch, SftObjective("sum"))
        made.engine.optimizer_step(0, loss.loss)
        (part,) = made.engine.optimizer.chained_optimizers
        mains = made.engine.optimizer_parameters() if dtype == "bf16" else []
        states = [value for state in part.optimizer.state.values() for value in state.values()]
        return sum(p.numel() for p in made.engine.chunks[0].parameters()), sum(each.nbytes for each in (*mains, *states))


@pytest.mark.ranks
@pytest.mark.parametrize("dtype", ["bf16", pytest.param("fp32", marks=MORE)])
def test_state_takes_the_bytes_that_are_planned(model, dtype):
    from tests.plan.test_kept import job

    ranks = world.run(2, bytes_of_state, model, {"data": 2}, dtype)
    planned = job(dtype=dtype, moment_bytes=2).state_bytes
    assert sum(held for _, held in ranks) == planned * ranks[0][0]
    assert planned == (8 if dtype == "bf16" else 4)
