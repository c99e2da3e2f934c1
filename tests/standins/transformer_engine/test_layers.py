"""Models of Transformer Engine's own layers, `compiled` its kernels, in float32: like others, they equal transformers."""

from __future__ import annotations

import itertools

import pytest

from tests.lib import families
from tests.lib.layouts import FEW, LAYOUTS, check
from tests.lib.truths import Truths

LR = 0.02
MODELS = (*families.LLAMAS, *families.FAMILIES)
PAIRWISE = [  # model, layout, micro-batches, reduction, recompute
    ("Llama tied", "PP2xVPP2", 2, "token_mean", "full"),
    ("Qwen 3", "TP2", 2, "sum", "none"),
    ("OLMo 3", "TP2xCP2", 2, "token_mean", "selective"),
]
_TURNS = itertools.cycle([(2, "sum", "none"), (4, "token_mean", "selective"), (None, "sum", "full")])
GRID = [(model, name, *next(_TURNS)) for model, name in itertools.product(MODELS, LAYOUTS)]


@pytest.fixture(scope="module")
def truth(tmp_path_factory):
    return Truths.of_training(tmp_path_factory, families.make_language_model, LR)


@pytest.mark.parametrize(("model", "layout", "micro_batches", "reduction", "recompute"), PAIRWISE)
def test_layers_equal_hugging_face(truth, tmp_path, model, layout, micro_batches, reduction, recompute):
    check(truth, tmp_path, layout, model, micro_batches, reduction, recompute, LR, FEW)


@pytest.mark.acceptance
@pytest.mark.parametrize(("model", "layout", "micro_batches", "reduction", "recompute"), GRID)
def test_full_grid(truth, tmp_path, model, layout, micro_batches, reduction, recompute):
    check(truth, tmp_path, layout, model, micro_batches, reduction, recompute, LR)
