"""Low-rank adapters beside Transformer Engine's layers, whose norms are modules of their own then, against PEFT."""

from __future__ import annotations

import pytest

from tests.train.test_lora import check, truth

__all__ = ["truth"]
pytestmark = pytest.mark.ranks


@pytest.mark.parametrize(
    ("kind", "layout", "how", "recompute"),
    [
        ("Llama", "TP2", "r3", "none"),
        pytest.param("Qwen 3", "TP2 without SP", "r8 rslora, some", "full", marks=pytest.mark.acceptance),
        pytest.param("OLMo 2", "PP2xVPP2", "r3", "none", marks=pytest.mark.acceptance),
    ],
)
def test_adapters_are_pefts(truth, tmp_path, kind, layout, how, recompute):
    check(truth, tmp_path, kind, layout, how, recompute)
