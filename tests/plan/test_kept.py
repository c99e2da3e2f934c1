"""What a layer keeps, against what autograd keeps of the functions that it is made of; and what follows from it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tulu_mega.config import EngineSettings, OptimSettings, ParallelSettings
from tulu_mega.config.recompute import Recomputed, recomputed
from tulu_mega.layout.hardware import GPUS
from tulu_mega.model.swiglu import Swiglu
from tulu_mega.plan.model.calibration import RATES
from tulu_mega.plan.model.job import Job, Pack
from tulu_mega.plan.model.kept import layer_kept, token_bytes
from tulu_mega.plan.model.kernels import Kernels, host_share, kernels_of, moment_bytes
from tulu_mega.plan.model.memory import memory_by_rank, state_host_bytes
from tulu_mega.plan.model.timing import train_step

CORE, FULL = recomputed("selective", None), recomputed("full", None)
ARCHITECTURES = Path(__file__).parents[2] / "examples/architectures"
TOKENS, FFN = 8, 32


def job(model: str = "llama3.1_8b", parallel: ParallelSettings = ParallelSettings(), **options) -> Job:  # noqa: B008
    config = json.loads((ARCHITECTURES / model / "config.json").read_text())
    pack = Pack(4096, (512,) * 8, 2048)
    return Job(config, parallel, GPUS["h100"], ((pack,) * 8,), **options)


def bytes_of(job: Job, *whats: str) -> float:
    kept = {each.what: each.bytes for each in layer_kept(job)}
    return sum(kept[what] for what in whats)


def kept_by_autograd(compute, *inputs: Tensor) -> int:
    """Bytes of distinct memory that backward functions keep."""
    storages = {}

    def pack(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        made = compute(*inputs)
    del made
    return sum(storages.values())


def leaf(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.bfloat16, requires_grad=True)


def chain(gate_and_up: Tensor) -> Tensor:
    """As megatron-core's MLP without fusion."""
    gate, up = torch.chunk(gate_and_up, 2, dim=-1)
    return F.silu(gate) * (up + 0.0)


@pytest.mark.parametrize(("compute", "fused"), [(Swiglu(), True), (chain, False)])
def test_an_activation_keeps_what_autograd_keeps(compute, fused):
    """Per channel of the feed-forward, and the product that the next projection keeps."""
    asked = job(kernels=Kernels(activation=fused))
    whats = ["gate and up"] + ([] if fused else ["gate's activation, and up once more"])
    weight = leaf(4, FFN)
    kept = kept_by_autograd(lambda x: compute(x) @ weight.t(), leaf(TOKENS, 2 * FFN))
    channel = (bytes_of(asked, *whats, "their product")) / asked.size.ffn
    assert kept - weight.nbytes == channel * TOKENS * FFN
    assert channel == (6 if fused else 10)


def test_a_chain_of_rotations_keeps_cosines_and_sines():
    """As megatron-core's rotary embedding without fusion, for queries and once more for keys."""
    heads, channels = 4, 16
    angles = torch.randn(TOKENS, 1, channels)

    def rotate(x: Tensor) -> Tensor:
        cosine, sine = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        first, second = x.chunk(2, dim=-1)
        return x * cosine + torch.cat((-second, first), dim=-1) * sine

    asked = job(kernels=Kernels(rope=False))
    head = asked.size.queries / asked.size.heads
    kept = kept_by_autograd(rotate, leaf(TOKENS, heads, channels))
    assert 2 * kept == bytes_of(asked, "cosines and sines for queries and keys") / head * channels * TOKENS


def test_olmo2s_norm_of_projections_keeps_float32():
    asked, channels = job("olmo2_7b"), 24

    def norm(x: Tensor) -> Tensor:
        wide = x.float()
        return (torch.ones(channels, requires_grad=True) * (wide * torch.rsqrt(wide.pow(2).sum(-1, keepdim=True)))).to(x.dtype)

    kept = kept_by_autograd(norm, leaf(TOKENS, channels)) - 4 * channels
    both = asked.size.queries + asked.size.keys
    planned = bytes_of(asked, "queries and keys before and within their norms") / both * channels * TOKENS
    statistics = bytes_of(asked, "statistics of their norms") * TOKENS
    assert planned <= kept <= planned + statistics


def test_5f_where_the_activation_is_not_fused():
    """The review's figure: 2 f elements more, 7 GiB at 8,192 tokens of 8B under TP2."""
    parallel = ParallelSettings(tensor=2)
    fused, chained = (memory_by_rank(job(parallel=parallel, kernels=Kernels(activation=each)))[0] for each in (True, False))
    grown = (chained.activations - fused.activations) * 2 / 2**30
    assert grown == pytest.approx(8192 * 32 * 2 * 2 * 14336 / 2 / 2**30) == pytest.approx(7.0, abs=0.01)


@pytest.mark.parametrize("tensor", [1, 2])
@pytest.mark.parametrize("model", ["llama3.1_8b", "olmo2_7b", "qwen3_8b"])
def test_recomputing_frees_what_the_module_keeps(model, tensor):
    plain = job(model, ParallelSettings(tensor=tensor))
    size, share = plain.size, dict(h=plain.size.hidden / tensor, f=plain.size.ffn / tensor)
    freed = {}
    for modules in (("core_attn",), ("layernorm",), ("activation",), ("mlp",), ("layernorm", "activation")):
        again = dataclasses.replace(plain, recompute=Recomputed(frozenset(modules)))
        left, everything, _ = token_bytes(again)
        assert everything >= token_bytes(plain)[0]
        freed[modules] = token_bytes(plain)[0] - left
        costs = [train_step(each, RATES).seconds for each in (plain, again)]
        assert costs[1] >= costs[0]
        assert memory_by_rank(again)[0].working >= memory_by_rank(plain)[0].working
    normed = 0 if size.needs.norms == "after" else 2 * share["h"] + 4 / tensor
    # in the place of the values alone the checkpoint keeps the projection's whole result
    assert freed[("core_attn",)] == (4 * size.heads - 2 * (size.queries + size.keys)) / tensor
    assert freed[("layernorm",)] == 2 * normed
    assert freed[("activation",)] == 2 * share["f"]
    assert freed[("mlp",)] == 6 * share["f"] + normed
    assert freed[("layernorm", "activation")] == 2 * normed + 2 * share["f"]
    assert dataclasses.replace(plain, recompute=CORE).recompute.modules == {"core_attn"}


def test_layers_recomputed_in_part_lie_between():
    """The first n of each chunk: their inputs stay, of the others everything."""
    parallel = ParallelSettings(pipeline=4, virtual_pipeline=2)
    asked = {n: job(parallel=parallel, recompute=Recomputed(layers=n)) for n in (1, 2, 3, 4)}
    none, full = job(parallel=parallel), job(parallel=parallel, recompute=FULL)
    kept = [memory_by_rank(each)[0].activations for each in (none, *asked.values())]
    spent = [train_step(each, RATES).seconds for each in (none, *asked.values())]
    assert kept == sorted(kept, reverse=True) and spent == sorted(spent)
    assert kept[-1] == memory_by_rank(full)[0].activations and spent[-1] == train_step(full, RATES).seconds
    steps = {round(before - after) for before, after in zip(kept, kept[1:], strict=False)}
    assert len(steps) == 1


def test_outputs_that_are_not_given_back_are_counted():
    """405B as the recipe has it: 9 chunks and 14 stages in flight keep 2.4 GiB of what is already sent."""
    parallel = ParallelSettings(tensor=8, pipeline=14, virtual_pipeline=9)
    pack = Pack(5300, (530,) * 10, 3000)
    asked = dataclasses.replace(job("llama3.1_405b", parallel), packs=((pack,) * 14,), recompute=FULL)
    kept = memory_by_rank(dataclasses.replace(asked, kernels=Kernels(deallocate=False)))[0].outputs
    assert kept / 2**30 == pytest.approx(2.4, abs=0.2)
    assert memory_by_rank(asked)[0].outputs == 0


def test_collectives_without_user_buffers_are_exposed_whole():
    asked = job(parallel=ParallelSettings(tensor=4))
    through = dataclasses.replace(asked, kernels=Kernels(user_buffers=True))
    ours, theirs = train_step(asked, RATES).tensor, train_step(through, RATES).tensor
    assert theirs == pytest.approx(RATES.tensor_exposed * ours)


def test_what_is_not_fused_takes_longer():
    fused = train_step(job(), RATES)
    for change in (dict(activation=False), dict(rope=False), dict(weight_gradients=False)):
        assert train_step(job(kernels=Kernels(**change)), RATES).elementwise > fused.elementwise


def test_small_micro_batches_wait_for_the_host():
    pack = Pack(64, (64,), 32)
    small = dataclasses.replace(job(), packs=((pack,) * 8,))
    step = train_step(small, RATES)
    assert step.host > step.products
    assert train_step(job(), RATES).host == 0


def test_bf16_gradients_and_moments_are_counted_to_the_byte():
    plain = job(parallel=ParallelSettings(context=2))
    held = plain.held[0].total
    rank = memory_by_rank(dataclasses.replace(plain, grad_bytes=2, moment_bytes=2))[0]
    assert rank.gradients == 2 * held
    assert rank.optimizer == (4 + 2 + 2 + 4) * held / 2  # main parameters, moments, float32 gradients of the share
    assert memory_by_rank(plain)[0].optimizer == 12 * held / 2


@pytest.mark.parametrize(
    ("model", "megatron", "wanted"),
    [
        ({}, {}, Kernels()),
        ({"spec": "local"}, {}, Kernels(transformer_engine=False, own_attention=True, rope=False)),
        ({"attention": "flash3"}, {}, Kernels(own_attention=True)),
        ({}, {"bias_activation_fusion": False}, Kernels(activation=False)),
        ({}, {"glu_linear_offset": 1.0}, Kernels(activation=False)),
        (
            {},
            {"apply_rope_fusion": False, "gradient_accumulation_fusion": False},
            Kernels(rope=False, weight_gradients=False),
        ),
        ({}, {"deallocate_pipeline_outputs": False}, Kernels(deallocate=False)),
    ],
)
def test_kernels_are_those_that_the_settings_choose(model, megatron, wanted):
    settings = EngineSettings(model={"path": "x", **model}, megatron=megatron)
    assert kernels_of(settings) == wanted


@pytest.mark.parametrize(
    ("optim", "table", "wanted"),
    [
        ({}, {}, 4),
        ({"moments": "bf16"}, {}, 2),
        ({"name": "sgd"}, {}, 0),
        ({}, {"use_precision_aware_optimizer": True, "exp_avg_dtype": "bf16"}, 3),
    ],
)
def test_moments_have_the_size_that_the_settings_choose(optim, table, wanted):
    assert moment_bytes(OptimSettings(**optim), table) == wanted


def test_a_precision_aware_optimizer_copies_no_gradients():
    plain = job(grad_bytes=2)
    without = dataclasses.replace(plain, grad_copies=False)
    held = plain.held[0].total
    assert memory_by_rank(plain)[0].optimizer - memory_by_rank(without)[0].optimizer == 4 * held
    assert train_step(without, RATES).optimizer < train_step(plain, RATES).optimizer


def test_state_in_main_memory_is_not_on_the_device():
    """12 bytes a parameter over DP x CP; there, float32 gradients too. The update waits for the way there and back."""
    plain = job()
    half = dataclasses.replace(plain, host_share=0.5, grad_copies=False)
    held = plain.held[0].total
    assert memory_by_rank(plain)[0].optimizer - memory_by_rank(half)[0].optimizer == 0.5 * 12 * held / plain.shards
    assert state_host_bytes(half) == min(8, half.world) * 0.5 * 16 * held / half.shards and state_host_bytes(plain) == 0
    assert train_step(half, RATES).optimizer > train_step(plain, RATES).optimizer
    assert host_share({"optimizer_cpu_offload": True, "optimizer_offload_fraction": 0.5}) == 0.5
