"""Training steps of Transformer Engine's layers on a CUDA device that is not there: no tensor meets one of another device, and
nobody waits for the device more often than with our own layers."""

from __future__ import annotations

import pytest

from tests.standins.cuda_device.asking import asking, expect_few_waits, saved_models
from tests.standins.cuda_device.test_steps import ALONE, CONTEXT, FUSED, INTERLEAVED, PIPELINE, TENSOR
from tests.standins.transformer_engine.models import make_model


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return saved_models(tmp_path_factory, make_model)


@pytest.fixture(scope="module")
def steps(tmp_path_factory):
    with asking(tmp_path_factory.mktemp("guard"), "te") as answer:
        yield answer


CASES = [  # model, layout, rank, world, and what else there is to it
    ("Llama tied", PIPELINE, 7, 8, {"objective": "grpo", "recompute": "full"}),
    ("Qwen 3", CONTEXT, 3, 8, {}),
    ("Llama", TENSOR, 1, 2, {"precision": {"fp8": "tensorwise"}, "megatron": FUSED}),
    ("Llama", ALONE, 0, 1, {"objective": "shared"}),  # the layers are Transformer Engine's, the attention is not
]
MORE = [
    ("Llama", ALONE, 0, 1, {}),
    ("Llama", TENSOR, 1, 4, {"recompute": "selective", "objective": "dpo"}),
    ("Llama", INTERLEAVED, 3, 4, {"objective": "reward"}),
    ("OLMo 2", TENSOR, 0, 2, {"objective": "grpo"}),
    ("Mistral with windows", PIPELINE, 2, 4, {}),
    ("wide", TENSOR, 0, 2, {"precision": {"fp8": "blockwise"}}),
    ("Llama", ALONE, 0, 2, {"precision": {"fp8": "delayed"}, "recompute": "full"}),
    ("wide", TENSOR, 1, 4, {"precision": {"fp8": "blockwise", "fp8_param_gather": True}}),
]


@pytest.mark.parametrize(
    ("model", "layout", "rank", "size", "more"),
    [*CASES, *(pytest.param(*case, marks=pytest.mark.acceptance) for case in MORE)],
)
def test_a_step(models, steps, model, layout, rank, size, more):
    answer = steps({"model": models(model), "layout": layout, "rank": rank, "world": size, **more})
    assert "failed" not in answer, answer["failed"]
    assert answer["attention"] == (["varlen"] if more.get("objective") == "shared" else [])
    assert "TERowParallelLinear" in answer["layers"]
    for waits in (answer["scoring"], answer["waits"]):
        waits.pop("utils.py:_empty_tensor", None)  # which Transformer Engine makes once a process
    expect_few_waits(answer)
