"""Everything fused gives what nothing fused gives, within bf16's rounding."""

from __future__ import annotations

import numpy as np
import pytest

from tests.lib import layouts, world
from tests.lib.layouts import size
from tests.standins.transformer_engine.models import make_model
from tests.standins.transformer_engine.test_kernels import LR, STEPS, counted

pytestmark = pytest.mark.ranks

OFF = {
    "bias_activation_fusion": False, "apply_rope_fusion": False, "gradient_accumulation_fusion": False,
    "deallocate_pipeline_outputs": False, "batch_p2p_sync": True,
}  # fmt: skip
MORE = pytest.mark.acceptance


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("Llama", "TP2xPP2"),
        pytest.param("Qwen 3", "TP2", marks=MORE),
        pytest.param("OLMo 3", "PP2xVPP2", marks=MORE),
        pytest.param("Mistral with windows", "TP2xCP2", marks=MORE),
    ],
)
def test_all_on_and_all_off_train_alike(tmp_path, name, layout):
    directory, where = str(tmp_path / "model"), layouts.LAYOUTS[layout]
    world.run(1, make_model, directory, name)
    found = []
    for megatron in (None, OFF):
        ranks = world.run(size(where), counted, directory, where, 2, "sum", STEPS, LR, None, "none", "bf16", megatron)
        found.append(ranks[-1])
        for rank in ranks:
            assert ("fused_rope_backward" in rank["calls"]) == (megatron is None)
    np.testing.assert_allclose(found[0]["losses"], found[1]["losses"], rtol=2e-3)
    np.testing.assert_allclose(found[0]["norms"], found[1]["norms"], rtol=2e-2)
