"""Training steps on a CUDA device that is not there: no tensor meets one of another device, and the host asks for values, which
it would wait for, a few times in a global batch, however many micro-batches and layers that has."""

from __future__ import annotations

import pytest

from tests.lib import families
from tests.standins.cuda_device.asking import NORM, asking, expect_few_waits, saved_models

ALONE, TENSOR, CONTEXT = {}, {"tensor": 2}, {"context": 2, "tensor": 2}
PIPELINE = {"tensor": 2, "pipeline": 2}
INTERLEAVED = {"pipeline": 2, "virtual_pipeline": 2}
FUSED = {"gradient_accumulation_fusion": True, "bias_activation_fusion": True}
PAIRWISE = [  # model, layout, rank, world, and what else there is to it
    ("Llama", ALONE, 0, 1, {}),
    ("Llama tied", ALONE, 0, 2, {"dtype": "fp32", "recompute": "full", "kernels": "torch", "megatron": FUSED}),
    ("Llama", TENSOR, 1, 4, {"recompute": "selective", "objective": "dpo"}),
    ("Llama tied", PIPELINE, 7, 8, {"objective": "grpo", "kernels": "torch"}),
    ("Llama", INTERLEAVED, 3, 4, {"objective": "reward"}),
    ("Qwen 3", ALONE, 0, 1, {"objective": "shared"}),
    ("OLMo 3", CONTEXT, 3, 8, {"recompute": "full"}),
]
MORE = [
    ("Llama", PIPELINE, 0, 8, {"objective": "reward", "recompute": "full"}),
    ("Llama", INTERLEAVED, 0, 4, {"megatron": FUSED}),
    ("OLMo 2", TENSOR, 0, 2, {"objective": "grpo"}),
    ("Qwen 2", CONTEXT, 0, 4, {"objective": "dpo"}),
    ("OLMo 3", PIPELINE, 2, 4, {"objective": "grpo", "recompute": "selective"}),
    ("Mistral with windows", ALONE, 0, 1, {"objective": "shared", "dtype": "fp32", "kernels": "torch"}),
]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return saved_models(tmp_path_factory, families.make_language_model)


@pytest.fixture(scope="module")
def steps(tmp_path_factory):
    """Asks a process for the answer to a case."""
    with asking(tmp_path_factory.mktemp("guard")) as answer:
        yield answer


@pytest.mark.parametrize(
    ("model", "layout", "rank", "size", "more"),
    [*PAIRWISE, *(pytest.param(*case, marks=pytest.mark.acceptance) for case in MORE)],
)
def test_a_step(models, steps, model, layout, rank, size, more):
    answer = steps({"model": models(model), "layout": layout, "rank": rank, "world": size, **more})
    assert "failed" not in answer, answer["failed"]
    assert answer["attention"] in ([], ["sdpa" if more.get("dtype") == "fp32" else "varlen"])
    expect_few_waits(answer)


@pytest.mark.parametrize(("layout", "rank", "size"), [({}, 0, 2), (INTERLEAVED, 0, 4)])
def test_a_run_waits_once_a_step(models, steps, layout, rank, size):
    """Behind the last step all are asked whether one of them is to end: a checkpoint of it is due."""
    answer = steps({"fitted": True, "model": models("Llama"), "layout": layout, "rank": rank, "world": size, "steps": 6})
    assert "failed" not in answer, answer["failed"]
    *before, last = answer["waits"]
    assert before == [{NORM: 1}] * 5
    assert last == {NORM: 1, "stop_signal.py:received": 1}


def test_a_tensor_of_the_host_is_noticed(steps):
    assert "found at least two devices, cuda:0 and cpu" in steps({"mixed": True})["failed"]


def test_reads_are_noticed(steps):
    assert steps({"reads": True}) == {"waits": {"steps.py:reads": 2}}
