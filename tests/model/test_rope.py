"""Frequencies, scalings and which layer has which, against the rotary modules of transformers."""

from __future__ import annotations

import math

import pytest
import torch

from tulu_mega.errors import UserError
from tulu_mega.model.rope import ropes

SIZES = dict(
    hidden_size=64, intermediate_size=96, num_hidden_layers=4, vocab_size=50, num_attention_heads=4, max_position_embeddings=256
)
YARN = {"rope_type": "yarn", "rope_theta": 5e5, "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip


def llama(**own):
    from transformers import LlamaConfig

    return LlamaConfig(**SIZES, **own, architectures=["LlamaForCausalLM"])


@pytest.mark.parametrize(
    "parameters",
    [
        {"rope_type": "default", "rope_theta": 1e4},
        LLAMA3,
        YARN,
        {**YARN, "rope_type": "linear"},
        {**YARN, "attention_factor": 1.5},
    ],
)
def test_one_rope_for_all_layers(parameters):
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = llama(rope_parameters=parameters)
    theirs, ours = LlamaRotaryEmbedding(config), ropes(config)
    (kind,) = ours.kinds
    torch.testing.assert_close(ours.frequencies, theirs.inv_freq, rtol=0, atol=0)
    assert kind.attention_scaling == theirs.attention_scaling and ours.of_layer == (0, 0, 0, 0)


def test_scores_are_scaled_as_queries_and_keys_would_be():
    (plain,), (scaled,) = (ropes(llama(rope_parameters=each)).kinds for each in (LLAMA3, YARN))
    assert plain.softmax_scale() is None
    assert scaled.softmax_scale() == pytest.approx((0.1 * math.log(4.0) + 1.0) ** 2 / math.sqrt(16))


def test_each_kind_of_layer_has_its_own():
    from transformers import Olmo3Config
    from transformers.models.olmo3.modeling_olmo3 import Olmo3RotaryEmbedding

    plain = {"rope_type": "default", "rope_theta": 1e3}
    parameters = {"full_attention": YARN, "sliding_attention": plain}
    config = Olmo3Config(**SIZES, rope_parameters=parameters, architectures=["Olmo3ForCausalLM"])
    theirs, ours = Olmo3RotaryEmbedding(config), ropes(config)
    full, sliding = ours.kinds
    assert ours.of_layer == (1, 1, 1, 0)
    torch.testing.assert_close(full.frequencies, theirs.full_attention_inv_freq, rtol=0, atol=0)
    torch.testing.assert_close(sliding.frequencies, theirs.sliding_attention_inv_freq, rtol=0, atol=0)
    assert (full.attention_scaling, sliding.attention_scaling) == (theirs.full_attention_attention_scaling, 1.0)
    torch.testing.assert_close(ours.frequencies, torch.cat((full.frequencies, sliding.frequencies)))


@pytest.mark.parametrize(
    ("parameters", "says"),
    [
        (
            {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
            "rope_type 'dynamic' of the model's config is not supported",
        ),
        ({"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
    ],
)
def test_what_is_not_known_is_refused(parameters, says):
    with pytest.raises(UserError, match=says):
        ropes(llama(rope_parameters=parameters))
