"""The policy loss's kernel, in Triton's interpreter, against torch autograd in float64, over pairs of everything it knows.

That the formulas in torch are the published ones is shown in tests/objectives (test_policy_ranks.py, test_policy_trl.py).
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from tulu_kernels.policy_loss import PolicyLoss, Tokens, policy_loss

from tests.kernels.compiled import compiled
from tests.lib import world

pytestmark = pytest.mark.ranks

CHOICES: dict[str, list[Any]] = {
    "loss": ["grpo", "dapo", "cispo", "gspo"],
    "aggregation": ["token", "sequence", "constant"],
    "importance": ["none", "token", "sequence"],
    "mask_above": [None, 1.5],
    "kl": [None, "k1", "k2", "k3"],
    "entropy": [0.0, 0.3],
    "old": [True, False],
    # empty segments, single tokens, more than a block, exactly a block, only padding
    "lengths": [[3, 0, 1, 9, 0], [300, 211, 2], [1], [500, 12], [1000, 0, 37], [7, 1033, 496]],
    "scale": [0.05, 1.0, 40.0, 150.0],
    "trained": ["most", "some responses", "nothing"],
}


def pairwise(choices: dict[str, list[Any]]) -> list[dict[str, Any]]:
    """Cases in which every pair of two choices is met, found greedily."""
    names = list(choices)
    left = {
        ((a, i), (b, j))
        for a, b in itertools.combinations(names, 2)
        for i in range(len(choices[a]))
        for j in range(len(choices[b]))
    }
    cases = []
    while left:
        case = dict(min(left))
        for name in names:
            if name not in case:
                met = {
                    i: sum(tuple(sorted(((name, i), other), key=lambda p: names.index(p[0]))) in left for other in case.items())
                    for i in range(len(choices[name]))
                }
                case[name] = max(met, key=met.get)
        left -= set(itertools.combinations([(name, case[name]) for name in names], 2))
        cases.append({name: choices[name][at] for name, at in case.items()})
    return cases


def loss_of(case: dict[str, Any]) -> PolicyLoss:
    """Bounds that float32 does not hold."""
    return PolicyLoss(
        case["loss"], 0.1, 0.28, case["aggregation"], max_tokens=37, beta=0.1 if case["kl"] else 0.0, kl=case["kl"] or "k3",
        entropy=case["entropy"], importance=case["importance"], importance_cap=1.3, mask_above=case["mask_above"],
    )  # fmt: skip


def tokens_of(case: dict[str, Any], seed: int, device: str = "cpu") -> Tokens:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.tensor(case["lengths"])
    segments = torch.repeat_interleave(lengths)
    share = torch.rand(len(segments), generator=generator)
    trained = (share < 0.8) & {"most": True, "some responses": segments % 2 == 0, "nothing": False}[case["trained"]]

    def drawn(scale: float) -> torch.Tensor:
        return scale * torch.randn(len(segments), generator=generator) * trained

    logp = drawn(1.0) - 2.0 * trained
    advantages = torch.randn(len(lengths), generator=generator)[segments] * (share > 0.1) * trained  # some are 0
    counts = torch.zeros_like(lengths).index_add(0, segments, trained.long())
    columns = [
        logp, drawn(1.0).abs(), logp + drawn(case["scale"] / 3), advantages, trained, segments, counts,
        logp + drawn(case["scale"]) if case["old"] else None, logp + drawn(1.0 if case["kl"] == "k3" else case["scale"]),
    ]  # fmt: skip
    return Tokens(*(column if column is None else column.to(device) for column in columns))


def results(backend: str, case: dict[str, Any], seed: int, device: str = "cpu") -> dict[str, torch.Tensor]:
    """Loss, metrics and gradients."""
    how, given = loss_of(case), tokens_of(case, seed, device)
    leaves = [given.logp_T.clone().requires_grad_(), given.entropy_T.clone().requires_grad_()]
    out = policy_loss(how, replace(given, logp_T=leaves[0], entropy_T=leaves[1]), backend=backend)
    found = {"loss_sum": out.loss_sum.detach(), **out.sums, **out.largest}
    gradients = torch.autograd.grad(0.37 * out.loss_sum, leaves, allow_unused=True)
    assert (gradients[1] is None) == (case["entropy"] == 0)
    for name, gradient in zip(("d logp", "d entropy"), gradients, strict=True):
        if gradient is not None:
            assert gradient.dtype == torch.float32
            found[name] = gradient.masked_fill(~given.trained_T, 0.0)  # others are constants
    return found


def both(cases: list[dict[str, Any]]):
    made = []
    for seed, case in enumerate(cases):
        sides = [results(backend, case, seed) for backend in ("triton", "torch")]
        again = results("triton", case, seed)
        assert all(torch.equal(x, again[name]) for name, x in sides[0].items())  # the same bits every time
        made.append([{name: x.double().numpy() for name, x in side.items()} for side in sides])
    return made


CASES = pairwise(CHOICES)


def compare(case: dict[str, Any], ours: dict[str, np.ndarray], truth: dict[str, np.ndarray]) -> None:
    assert ours.keys() == truth.keys()
    for name, y in truth.items():
        assert not np.isnan(y).any(), (case, name)
        # a gradient of gspo is the sum of two, in float32
        finite = np.abs(y[np.isfinite(y)]).max(initial=0)
        loose = (1e-6, 1e-7 * finite) if name.startswith("d ") else (1e-12, 1e-12)
        np.testing.assert_allclose(ours[name], y, rtol=loose[0], atol=loose[1], err_msg=f"{case}: {name}")


def test_the_kernel_is_autograd():
    assert len(CASES) < 60
    for case, (ours, truth) in zip(CASES, world.run(1, both, CASES)[0], strict=True):
        compare(case, ours, truth)


def test_the_cases_are_not_idle():
    """Every clip, cut and mask happens, and gradients are there."""
    seen: dict[str, float] = {}
    for seed, case in enumerate(CASES):
        for name, value in results("torch", case, seed).items():
            seen[name] = max(seen.get(name, 0.0), float(value.abs().sum()))
    assert len(seen) == 16 and min(seen.values()) > 0


def bounds():
    """Loss and gradient where the ratio is the bound itself, to float64's last bit, and beside it."""
    how = PolicyLoss("grpo", 0.1, 0.28, "token", 1)
    old = torch.zeros(6, dtype=torch.float64)
    logp = torch.log(torch.tensor([0.9, 0.9 - 1e-12, 1.28, 1.28 + 1e-12, 1.0, 1.0], dtype=torch.float64)).requires_grad_()
    advantages = torch.tensor([-1.0, -1.0, 1.0, 1.0, 1.0, 0.0], dtype=torch.float64)
    whole = torch.ones(6, dtype=torch.bool)
    found = []
    for backend in ("triton", "torch"):
        given = Tokens(logp, old, old, advantages, whole, torch.zeros(6, dtype=torch.int64), torch.tensor([6]), old_logp_T=old)
        out = policy_loss(how, given, backend=backend)
        found.append([float(out.loss_sum.detach()), *torch.autograd.grad(out.loss_sum, logp)[0].tolist()])
        found[-1] += [float(out.sums[name]) for name in ("clip_low", "clip_high")]
    return found


def test_bounds_are_those_of_float64():
    ours, truth = world.run(1, bounds)[0]
    assert ours == pytest.approx(truth, rel=1e-14)
    assert ours[2] == ours[4] == 0 and abs(ours[3]) > 1 and abs(ours[5]) == pytest.approx(1)


def alike(loss: str):
    """Ratio, divergence and weight of a policy that is its own sampler and reference; gradient over what it should be."""
    case = {"lengths": [300, 0, 419], "trained": "most", "scale": 1.0, "kl": "k3", "old": True}
    given = tokens_of(case, 5)
    logp = given.logp_T.clone().requires_grad_()
    advantages = torch.tensor([1.5, 0.0, -0.5])[given.segments_T] * given.trained_T
    same = dict.fromkeys(("sampler_logp_T", "old_logp_T", "ref_logp_T"), given.logp_T)
    given = replace(given, advantages_T=advantages, logp_T=logp, **same)
    how = PolicyLoss(loss, 0.2, 0.2, "token", 1, beta=0.1, importance="sequence")
    out = policy_loss(how, given, backend="triton")
    (gradient,) = torch.autograd.grad(out.loss_sum, logp)
    n = out.sums["tokens"]
    exact = [out.sums["ratio"] / n, out.sums["importance_weight"] / n, out.largest["ratio_max"]]
    nothing = [out.sums[name] for name in ("kl", "clip_low", "clip_high", "sampler_difference")]
    off = (gradient + advantages)[given.trained_T].abs().max()
    return [float(x) for x in exact], [float(x) for x in nothing], float(off)


@pytest.mark.parametrize("loss", ["grpo", "cispo", "gspo"])
def test_before_the_update_the_ratio_is_one(loss):
    ones, zeros, off = world.run(1, alike, loss)[0]
    assert ones == [1, 1, 1] and zeros == [0, 0, 0, 0] and off <= (1e-6 if loss == "gspo" else 0)


ARRAYS = dict.fromkeys(
    ("logp", "old", "sampler", "ref", "advantages", "entropy", "d_logp", "d_entropy"), "*fp32"
) | dict.fromkeys(("log_ratios", "log_weights", "d_log_ratio", "partials"), "*fp64")  # fmt: skip
ARRAYS |= {"trained": "*u8", "segments": "*i64", "inverses": "*fp64", "count": "i32"}


@pytest.mark.parametrize(
    ("loss", "more"),
    [
        ("grpo", True), ("cispo", False), ("gspo", True),
        *(pytest.param(*case, marks=pytest.mark.acceptance) for case in (("grpo", False), ("cispo", True), ("gspo", False))),
    ],
)  # fmt: skip
def test_compiled_for_an_h100(loss, more):
    from tulu_kernels.policy_loss import kernel

    how = PolicyLoss(loss, 0.2, 0.28, "token", 99)
    if more:
        how = replace(how, aggregation="sequence", beta=0.1, entropy=0.01, importance="sequence", mask_above=1.5)
    made = compiled(
        kernel._pass,
        ARRAYS,
        kernel.constants_of(how, old=more, gradient=True) | dict(BLOCK=kernel._BLOCK),
        kernel._WARPS,
    )
    assert made.stack == 0 and "ld.global.v4.b32" in made.loads and "st.global.v4.b32" in made.stores, made
    assert not made.atomics


gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@gpu
@pytest.mark.gpu
def test_on_a_gpu():
    """The compiled kernel against torch on the same device."""
    for seed, case in enumerate(CASES):
        sides = [{n: x.double().cpu().numpy() for n, x in results(b, case, seed, "cuda").items()} for b in ("triton", "torch")]
        compare(case, *sides)


@gpu
@pytest.mark.gpu
def test_it_can_be_captured():
    """In a CUDA graph, which nothing that waits for the device can be; the replay reads what is there by then."""
    case = {**CASES[0], "loss": "gspo", "importance": "sequence", "lengths": [700, 0, 1001], "trained": "most", "scale": 0.1}
    given, how = tokens_of(case, 3, "cuda"), loss_of(case)
    logp = given.logp_T.clone().requires_grad_()

    def step():
        out = policy_loss(how, replace(given, logp_T=logp), backend="triton")
        return out.loss_sum.detach(), *torch.autograd.grad(out.loss_sum, logp)

    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        step()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        logp.mul_(0.9)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, step(), strict=True))
