"""Memory of ranks: known counts, what must hold of any layout, the published runs."""

from __future__ import annotations

import dataclasses
import json
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tulu_kernels.linear_logprob import WORKSPACE

from tulu_mega.config import ParallelSettings
from tulu_mega.config.recompute import Recomputed, recomputed
from tulu_mega.layout.hardware import GPUS
from tulu_mega.layout.schedule import makespan, peak_held, timeline
from tulu_mega.plan.model import memory, rollouts
from tulu_mega.plan.model.calibration import CALIBRATION, HELD_OUT, HELD_OUT_BF16, RATES
from tulu_mega.plan.model.job import NOTHING, Job, Pack
from tulu_mega.plan.model.memory import checkpoint_host_bytes, memory_by_rank, resume_host_bytes
from tulu_mega.plan.model.rollouts import Servers, generation_seconds, server_memory, sync_seconds

CORE, FULL = recomputed("selective", None), recomputed("full", None)
ARCHITECTURES = Path(__file__).parents[2] / "examples/architectures"
GIB = 2**30


@cache
def content(name: str) -> dict:
    return json.loads((ARCHITECTURES / name / "config.json").read_text())


def job(model: str, parallel: ParallelSettings, data: int = 1, micro_batches: int = 32, tokens: int = 4096, **options) -> Job:
    pack = Pack(tokens, (tokens // 8,) * 8, tokens // 2)
    return Job(content(model), parallel, GPUS["h100"], ((pack,) * micro_batches,) * data, **options)


def fullest(job: Job) -> float:
    return max(rank.total for rank in memory_by_rank(job))


@pytest.mark.parametrize("run", CALIBRATION + HELD_OUT + HELD_OUT_BF16, ids=lambda run: run.name)
def test_published_runs_fit(run):
    assert fullest(run.job(content(run.architecture))) < GPUS["h100"].memory


@pytest.mark.parametrize("recompute", [NOTHING, CORE, FULL])
def test_405b_on_64_gpus_does_not_fit(recompute):
    asked = job("llama3.1_405b", ParallelSettings(tensor=8, pipeline=8), micro_batches=35, recompute=recompute)
    assert asked.world == 64
    assert fullest(asked) > 1.3 * GPUS["h100"].memory


def test_states_of_405b_by_hand():
    """PP14 at TP8 and DP2: 3.85 billion parameters on the first rank, 2 + 4 + 12 / 2 bytes each: 43 GiB."""
    first = memory_by_rank(job("llama3.1_405b", ParallelSettings(tensor=8, pipeline=14), data=2))[0]
    assert (first.weights + first.gradients + first.optimizer) / GIB == pytest.approx(43.0, abs=0.1)


def test_activations_of_8b_by_hand():
    """(4 + 2 + 2/4 + 3 x 3.5) x 2 = 34 bytes a channel and token, 32 layers, softmax of 32 heads, two norms."""
    alone = memory_by_rank(job("llama3.1_8b", ParallelSettings(), micro_batches=2))[0]
    assert alone.activations == 4096 * 32 * (34 * 4096 + 4 * 32 + 8)
    full = memory_by_rank(job("llama3.1_8b", ParallelSettings(), micro_batches=2, recompute=FULL))[0]
    assert full.activations == 4096 * 32 * 2 * 4096
    assert full.working > alone.activations / 32


LAYOUTS = st.builds(
    lambda tensor, pipeline, context, distributed: ParallelSettings(
        tensor=tensor,
        pipeline=pipeline[0],
        virtual_pipeline=pipeline[1],
        context=context,
        distributed_optimizer=distributed,
    ),
    st.sampled_from([1, 2, 4]),
    st.sampled_from([(1, 1), (2, 1), (4, 1), (4, 2)]),
    st.sampled_from([1, 2]),
    st.booleans(),
)


@settings(max_examples=40, deadline=None)
@given(LAYOUTS, st.sampled_from([NOTHING, CORE, FULL]), st.booleans())
def test_sharding_never_takes_more(parallel, recompute, fp8):
    base = job("llama3.1_8b", parallel, data=2, recompute=recompute, fp8=fp8)
    for rank in memory_by_rank(base):
        assert rank.total == pytest.approx(sum(rank.parts.values()))
        assert all(part >= 0 for part in rank.parts.values())
    wider = dict(tensor=parallel.tensor * 2), dict(context=parallel.context * 2)
    for change in wider:
        other = dataclasses.replace(base, parallel=parallel.model_copy(update=change))
        for before, after in zip(memory_by_rank(base), memory_by_rank(other), strict=True):
            assert after.activations <= before.activations
            assert after.weights + after.gradients + after.optimizer <= before.weights + before.gradients + before.optimizer
    more = dataclasses.replace(base, packs=base.packs * 2)
    sharded = parallel.distributed_optimizer
    for before, after in zip(memory_by_rank(base), memory_by_rank(more), strict=True):
        assert after.optimizer == pytest.approx(before.optimizer / (2 if sharded else 1))
    kinds = (NOTHING, Recomputed(frozenset({"activation"})), Recomputed(frozenset({"activation", "layernorm"})), FULL)
    kept = [memory_by_rank(dataclasses.replace(base, recompute=kind))[0].activations for kind in kinds]
    assert kept == sorted(kept, reverse=True)
    assert memory_by_rank(dataclasses.replace(base, recompute=FULL))[0].activations < memory_by_rank(base)[0].activations + 1


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 5), st.integers(1, 3), st.integers(1, 4))
def test_the_schedule_holds_what_megatron_core_says(ranks, chunks, rounds):
    """1F1B: ranks - rank micro-batches; interleaved: the warm-up's passes and one."""
    if ranks == 1:
        chunks = 1
    count = rounds * ranks
    ones = [[1.0] * ranks * chunks] * count
    for rank in range(ranks):
        if chunks == 1:
            expected = min(count, ranks - rank)
        else:
            expected = min(count * chunks, (ranks - rank - 1) * 2 + (chunks - 1) * ranks + 1)
        assert peak_held(rank, ranks, chunks, ones) == expected
    spans = timeline(ones, [[2.0] * ranks * chunks] * count, ranks, chunks)
    assert max(span.end for span in spans) == makespan(ones, [[2.0] * ranks * chunks] * count, ranks, chunks)
    assert len({(span.micro_batch, span.stage, span.backward) for span in spans}) == len(spans) == 2 * count * ranks * chunks
    for rank in range(ranks):
        own = sorted((span.start, span.end) for span in spans if span.rank == rank)
        assert all(before[1] <= after[0] for before, after in zip(own, own[1:], strict=False))


def test_host_memory_of_a_save():
    """405B at TP8 PP14: a save has a piece of at most 64 MiB, or a weight, of each rank in main memory. Behind training every
    rank copies its half of main parameters and moments, and the first of two ranks the weights whose half is elsewhere."""
    asked = job("llama3.1_405b", ParallelSettings(tensor=8, pipeline=14), data=2)
    passing = checkpoint_host_bytes(asked, "reshardable", False)
    assert passing == checkpoint_host_bytes(asked, "same_layout", False) == resume_host_bytes(asked) / 2
    weight = 2 * 128256 * 16384 / 8
    assert passing / 8 == pytest.approx(weight, rel=0.02)
    held = asked.held[-1].total  # with the final norm
    assert checkpoint_host_bytes(asked, "reshardable", True) == passing + 8 * held * (6 + 1)
    assert checkpoint_host_bytes(asked, "same_layout", True) == passing + 8 * held * (6 + 2)


@pytest.mark.parametrize(("asynchronous", "measured"), [(False, 61.8e6), (True, 1678.8e6)])
def test_host_memory_of_a_save_is_what_was_measured(asynchronous, measured):
    """By tools/bench_save.py, with its model of 135 million parameters; docs/explanation/planner_model.md has the figures."""
    config = {
        "architectures": ["LlamaForCausalLM"], "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
        "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 96, "vocab_size": 49152, "tie_word_embeddings": True,
    }  # fmt: skip
    asked = Job(config, ParallelSettings(), GPUS["h100"], ((Pack(64, (64,), 64),),))
    assert checkpoint_host_bytes(asked, "reshardable", asynchronous) == pytest.approx(measured, rel=0.1)
    assert resume_host_bytes(asked) == pytest.approx(118e6, rel=0.1)


def test_constants_are_those_of_what_is_planned_for():
    assert WORKSPACE == memory.LOGITS


def servers(count: int = 1, tensor: int = 1, concurrency: int = 256) -> Servers:
    return Servers(count, tensor, GPUS["h100"], concurrency, 0.9, 2, 256 * 2**20)


def test_a_server_holds_weights_and_cache():
    """8B: 131,072 bytes a token for keys and values (2 x 32 layers x 1,024 channels x 2 bytes), 15 GiB of weights."""
    held = server_memory(content("llama3.1_8b"), servers())
    assert held.weights / GIB == pytest.approx(14.96, abs=0.01)
    assert held.tokens == int(held.cache // 131_072)
    assert held.weights + held.cache + held.working == pytest.approx(0.9 * GPUS["h100"].memory)
    assert server_memory(content("llama3.1_405b"), servers(tensor=8)).cache < 0
    assert server_memory(content("llama3.1_405b"), servers(tensor=16)).tokens > 100_000


def test_a_worker_has_a_buffer_for_each_sender():
    """405B from 14 stages: 12 with gate or up (1.74 GB) for the largest, embedding and head (4.20 GB), and a gate that waits for
    up. In FP8 matrices take half. Servers on the trainer's host look into its own buffers."""
    policy = job("llama3.1_405b", ParallelSettings(tensor=8, pipeline=14))
    matrix, end = 2 * 16384 * 53248, 2 * 16384 * 128256
    for fp8, share in ((False, 1), (True, 2)):
        apart = dataclasses.replace(servers(tensor=8), elsewhere=True, fp8=fp8)
        wanted = 13 * matrix / share + 2 * end + 14 * rollouts.COMMUNICATOR + rollouts.HASHING
        assert server_memory(content("llama3.1_405b"), apart, policy).sync == pytest.approx(wanted, rel=1e-3)
    near = job("llama3.1_8b", ParallelSettings(tensor=4))
    assert server_memory(content("llama3.1_8b"), servers(count=4), near).sync == 2 * 4096 * 14336 + rollouts.HASHING


def test_generation_is_bound_by_memory_then_by_arithmetic():
    model = content("llama3.1_8b")
    one = generation_seconds(model, servers(), [128], [1000], RATES)
    weights = 7.5e9 * 2 / (RATES.memory * GPUS["h100"].bandwidth)
    assert one == pytest.approx(1000 * (weights + rollouts.STEP), rel=0.05)
    many = generation_seconds(model, servers(), [128] * 256, [1000] * 256, RATES)
    assert one < many < 3 * one
    assert generation_seconds(model, servers(count=2), [128] * 256, [1000] * 256, RATES) < many
    assert generation_seconds(model, servers(concurrency=64), [128] * 256, [1000] * 256, RATES) > 2 * one
    assert generation_seconds(content("llama3.1_405b"), servers(tensor=8), [128], [1000], RATES) == float("inf")


def test_weights_travel_at_the_rate_of_a_link():
    policy = job("llama3.1_405b", ParallelSettings(tensor=8, pipeline=14))
    whole = 405.85e9 * 2 / (RATES.links * GPUS["h100"].network)
    assert sync_seconds(policy, servers(tensor=16), RATES) == pytest.approx(whole, rel=1e-3)
    near = job("llama3.1_8b", ParallelSettings(tensor=4))
    assert sync_seconds(near, servers(count=4), RATES) < 1
