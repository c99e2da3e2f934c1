"""What Transformer Engine's layers keep for their backward pass, held against the planner's figures and their own source.

The Python half, which keeps, is Transformer Engine's own; the shapes of what its compiled half returns are the stand-in's.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from tests.lib import keeping, world
from tests.standins.transformer_engine.models import make_model
from tests.standins.transformer_engine.package import DIRECTORY
from tulu_mega.config import EngineSettings, ParallelSettings
from tulu_mega.layout.hardware import GPUS
from tulu_mega.plan.model.job import Job, Pack
from tulu_mega.plan.model.kept import token_bytes
from tulu_mega.plan.model.kernels import kernels_of

pytestmark = pytest.mark.ranks

NONE = {"recompute": "none"}
MODULES = [["layernorm"], ["activation"], ["mlp"], ["core_attn"], ["activation", "layernorm"], ["layernorm", "mlp"]]
UNFUSED = {"megatron": {"bias_activation_fusion": False, "apply_rope_fusion": False}}
FP8 = {"precision": {"fp8": "tensorwise"}}
AGAIN = [NONE, *({"recompute": each} for each in MODULES)]
MORE = pytest.mark.acceptance


def planned(directory: str, layout: dict, dtype: str, case: dict, tokens: int) -> float:
    """Bytes that the planner counts for a layer of this rank."""
    settings = EngineSettings.model_validate(
        {"model": {"path": directory, "dtype": dtype, "recompute": case.get("recompute", "none")}, "parallel": layout,
         "megatron": case.get("megatron", {})}
    )  # fmt: skip
    job = Job(
        json.loads(Path(directory, "config.json").read_text()),
        ParallelSettings(**layout),
        GPUS["h100"],
        ((Pack(tokens, (tokens,), tokens),),),
        dtype=dtype,
        recompute=settings.model.recomputed,
        kernels=kernels_of(settings),
        fp8="precision" in case,
    )
    return token_bytes(job)[0] * tokens


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    made: dict[str, str] = {}

    def directory(name: str) -> str:
        if name not in made:
            made[name] = str(tmp_path_factory.mktemp("kept") / "model")
            world.run(1, make_model, made[name], name)
        return made[name]

    return directory


@pytest.mark.parametrize(
    ("name", "layout", "cases"),
    [
        ("Llama", {}, [*AGAIN, UNFUSED]),
        pytest.param("Llama", {"tensor": 2}, AGAIN, marks=MORE),
        pytest.param("Llama", {"tensor": 2, "sequence": False}, AGAIN, marks=MORE),
        pytest.param("Qwen 3", {}, AGAIN, marks=MORE),
        pytest.param("OLMo 2", {}, [NONE, {"recompute": ["activation"]}, {"recompute": ["mlp"]}], marks=MORE),
        pytest.param("wide", {}, [FP8, *({**FP8, "recompute": each} for each in MODULES)], marks=MORE),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_a_layer_keeps_what_is_planned_and_recomputation_changes_no_gradient(model, name, layout, cases):
    directory = model(name)
    found = [ranks[0] for ranks in keeping.of_a_layer(directory, layout, "bf16", cases)]
    wrong = {}
    for case, seen in zip(cases, found, strict=True):
        kept, wanted = sum(size for _, size in seen["kept"]), planned(directory, layout, "bf16", case, seen["tokens"])
        scales = 64 if "precision" in case else 0  # a number for each tensor in FP8
        if not 0 <= kept - wanted <= scales:
            each = [(module, size / seen["tokens"]) for module, size in seen["kept"]]
            wrong[str(case)] = (kept / seen["tokens"], wanted / seen["tokens"], each)
        if case.keys() <= {"recompute"}:
            before = keeping.gradients(found[0])
            for parameter, value in keeping.gradients(seen).items():
                np.testing.assert_array_equal(value, before[parameter], err_msg=f"{case}: {parameter}")
    assert not wrong, wrong


LINES = [  # module, name in the source, bytes of a token by h, q, k, f, heads, and the line
    ("self_attention.linear_qkv", "inputmat,", lambda h, q, k, f, n: 2 * h, "module/layernorm_linear.py:467"),
    ("self_attention.linear_qkv", "ln_out,", lambda h, q, k, f, n: 2 * h, "module/layernorm_linear.py:472"),
    ("self_attention.linear_qkv", "rsigma,", lambda h, q, k, f, n: 4, "module/layernorm_linear.py:474"),
    ("self_attention.core_attention.fused_attention", "qkvo_tensors = (q, k, v, out)", lambda h, q, k, f, n: 2 * q,
     "attention/dot_product_attention/backends.py:1301"),
    ("self_attention.core_attention.fused_attention", "*qkvo_tensors,", lambda h, q, k, f, n: 2 * k,
     "attention/dot_product_attention/backends.py:1325"),
    ("self_attention.core_attention.fused_attention", "*qkvo_tensors,", lambda h, q, k, f, n: 2 * k,
     "attention/dot_product_attention/backends.py:1325"),
    ("self_attention.core_attention.fused_attention", "*qkvo_tensors,", lambda h, q, k, f, n: 2 * q,
     "attention/dot_product_attention/backends.py:1325"),
    ("self_attention.core_attention.fused_attention", "*aux_ctx_tensors,", lambda h, q, k, f, n: 4 * n,
     "attention/dot_product_attention/backends.py:1330"),
    ("mlp.linear_fc1", "inputmat,", lambda h, q, k, f, n: 2 * h, "module/layernorm_linear.py:467"),
    ("mlp.linear_fc1", "ln_out,", lambda h, q, k, f, n: 2 * h, "module/layernorm_linear.py:472"),
    ("mlp.linear_fc1", "rsigma,", lambda h, q, k, f, n: 4, "module/layernorm_linear.py:474"),
    ("mlp.activation_func", "", lambda h, q, k, f, n: 4 * f, ""),  # our own SwiGLU
    ("mlp.linear_fc2", "saved_inputmat,", lambda h, q, k, f, n: 2 * f, "module/linear.py:434"),
]  # fmt: skip
"""Of v2.11, in transformer_engine/pytorch/. What `_Linear` of the attention's output keeps is attention's result, and counted
there."""


def test_each_tensor_has_its_line_in_the_source(model):
    ((seen,),) = keeping.of_a_layer(model("Llama"), {}, "bf16", [NONE])
    extents = dict(h=64, q=64, k=32, f=96, n=4)  # as `models.make_model` has them
    listed = Counter((module, size(**extents)) for module, _, size, _ in LINES)
    assert listed == Counter((module, size / seen["tokens"]) for module, size in seen["kept"])
    for _, text, _, place in LINES:
        if place:
            file, number = place.split(":")
            line = (DIRECTORY / "transformer_engine/pytorch" / file).read_text().splitlines()[int(number) - 1]
            assert line.strip() == text, place
