"""What is computed again backward changes no gradient, whatever is chosen, and is not kept."""

from __future__ import annotations

import numpy as np
import pytest

from tests.lib import families, keeping, world

pytestmark = pytest.mark.ranks

NONE = {"recompute": "none"}
CHOICES = [
    "full", ["layernorm"], ["activation"], ["mlp"], ["core_attn"], ["layernorm", "activation"],
    ["layernorm", "mlp", "core_attn"],
]  # fmt: skip
MORE = pytest.mark.acceptance


@pytest.mark.parametrize(
    ("name", "layout", "choices"),
    [
        ("Llama", {}, CHOICES),
        pytest.param("Llama", {"tensor": 2, "pipeline": 2}, CHOICES, marks=MORE),
        pytest.param("Qwen 3", {"tensor": 2}, CHOICES, marks=MORE),
        pytest.param("OLMo 2", {"tensor": 2, "sequence": False}, ["full", ["activation"], ["mlp", "core_attn"]], marks=MORE),
        pytest.param("Llama", {"context": 2}, CHOICES, marks=MORE),
        pytest.param("Mistral with windows", {}, CHOICES, marks=MORE),
    ],
)
def test_gradients_are_those_of_what_is_kept(tmp_path, name, layout, choices):
    directory = str(tmp_path / "model")
    world.run(1, families.make_language_model, directory, name)
    plain, *others = keeping.of_a_layer(directory, layout, "fp32", [NONE, *({"recompute": each} for each in choices)])
    for choice, ranks in zip(choices, others, strict=True):
        for before, seen in zip(plain, ranks, strict=True):
            assert seen["loss"] == before["loss"]
            assert sum(size for _, size in seen["kept"]) < sum(size for _, size in before["kept"]), choice
            want = keeping.gradients(before)
            for parameter, value in keeping.gradients(seen).items():
                np.testing.assert_array_equal(value, want[parameter], err_msg=f"{choice}: {parameter}")


def test_layers_that_norm_afterwards_have_no_norm_to_compute_again(tmp_path):
    directory = str(tmp_path / "model")
    world.run(1, families.make_language_model, directory, "OLMo 2")
    with pytest.raises(Exception, match=r"norm what attention and feed-forward give.*leave 'layernorm' out"):
        keeping.of_a_layer(directory, {}, "fp32", [{"recompute": ["layernorm"]}])


def layers_again(directory: str, layers: int | None) -> list[bool]:
    """Of each layer of this rank whether it keeps more than its input."""
    from tests.lib import jobs
    from tulu_mega.config import OptimSettings
    from tulu_mega.objectives.sft import SftObjective

    options = {"recompute": "full"} if layers is None else {"recompute": "full", "recompute_layers": layers}
    with jobs.session(directory, {"pipeline": 2}, "fp32", model_settings=options) as made:
        engine = made.engine
        (batch,) = jobs.share(made, jobs.sequences(engine.hf.vocab_size), 1)
        engine.prepare_training(OptimSettings(name="sgd", lr=0.0), 1)
        watched = [keeping.Watched(layer, set()) for layer in engine.chunks[0].decoder.layers]
        engine.forward_backward([batch], SftObjective("sum"))
        return [bool(each.passes > 1) for each in watched]


@pytest.mark.parametrize(("layers", "wanted"), [(1, [True, False]), (None, [True, True])])
def test_the_first_layers_of_each_chunk(tmp_path, layers, wanted):
    directory = str(tmp_path / "model")
    world.run(1, families.make_language_model, directory, "Llama")
    assert world.run(2, layers_again, directory, layers) == [wanted, wanted]
