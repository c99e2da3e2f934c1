"""Training steps of Transformer Engine's layers on a CUDA device that is not there: no tensor meets one of another device, and
nobody waits for the device more often than with our own layers."""

from __future__ import annotations

import pytest

from tests.distributed import world
from tests.fake_cuda.asking import asking
from tests.fake_cuda.test_steps import ALONE, CONTEXT, COUNT, FUSED, INTERLEAVED, MESSAGES, METRICS, NORM, PIPELINE, TENSOR
from tests.te.models import make_model


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    made = {}

    def get(name: str) -> str:
        if name not in made:
            made[name] = str(tmp_path_factory.mktemp("te_steps") / "model")
            world.run(1, make_model, made[name], name)
        return made[name]

    return get


@pytest.fixture(scope="module")
def steps(tmp_path_factory):
    with asking(tmp_path_factory.mktemp("guard"), "te") as answer:
        yield answer


CASES = [  # model, layout, rank, world, and what else there is to it
    ("Llama tied", PIPELINE, 7, 8, {"objective": "grpo", "recompute": "full"}),
    ("Qwen 3", CONTEXT, 3, 8, {}),
    ("Llama", TENSOR, 1, 2, {"precision": {"fp8": "tensorwise"}, "megatron": FUSED}),
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
    assert answer["attention"] == [] and "TERowParallelLinear" in answer["layers"]
    scoring, training = answer["scoring"], answer["waits"]
    for waits in (scoring, training):
        waits.pop("utils.py:_empty_tensor", None)  # which Transformer Engine makes once a process
    if layout == PIPELINE:
        assert scoring.pop(MESSAGES) and training.pop(MESSAGES)
    assert scoring == {}
    assert training == {NORM: 1, COUNT: layout.get("virtual_pipeline", 1), METRICS: answer["metrics"]}
