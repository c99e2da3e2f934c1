"""Parameters of ranks: they make up the model, whole and once."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from tulu_mega.bridge.families import family_for
from tulu_mega.bridge.families.reward import reward_fields
from tulu_mega.config import ParallelSettings
from tulu_mega.distributed.grid import ShardGrid
from tulu_mega.layout.stages import stage_layers
from tulu_mega.plan.model.parameters import model_parameters, rank_parameters, stage_shards

ARCHITECTURES = Path(__file__).parents[2] / "examples/architectures"
PUBLISHED = {
    "llama3.1_8b": 8_030_261_248,
    "llama3.1_70b": 70_553_706_496,
    "llama3.1_405b": 405_853_388_800,
    "olmo2_7b": 7_298_617_344,
    "olmo2_13b": 13_716_198_400,
    "olmo2_32b": 32_234_279_936,
}
TINY = dict(vocab_size=100, hidden_size=64, intermediate_size=96, num_attention_heads=8, num_key_value_heads=4, head_dim=8)
FAMILIES = {
    "LlamaForCausalLM": {},
    "Olmo2ForCausalLM": {},
    "Qwen2ForCausalLM": {"use_sliding_window": False},
    "Qwen3ForCausalLM": {},
}


def content(name: str) -> dict:
    return json.loads((ARCHITECTURES / name / "config.json").read_text())


def tiny(architecture: str, layers: int, tied: bool, reward: bool) -> dict:
    base = TINY | FAMILIES[architecture] | dict(num_hidden_layers=layers, tie_word_embeddings=tied, architectures=[architecture])
    return base | reward_fields(family_for(base), base) if reward else base


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_have_as_many_as_transformers_says(name):
    with torch.device("meta"):
        built = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(ARCHITECTURES / name))
    assert model_parameters(content(name)) == built.num_parameters() == PUBLISHED[name]


@pytest.mark.parametrize("architecture", FAMILIES)
@pytest.mark.parametrize("tied", [False, True])
def test_every_family_has_as_many_as_transformers_says(architecture, tied):
    kind = architecture.removesuffix("ForCausalLM").lower()
    content = tiny(architecture, 3, tied, reward=False)
    with torch.device("meta"):
        language = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **content))
        fields = reward_fields(family_for(content), content)
        score = AutoModelForSequenceClassification.from_config(AutoConfig.for_model(kind, **content | fields))
    assert model_parameters(content) == language.num_parameters()
    assert model_parameters(content | fields) == score.num_parameters()


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(list(FAMILIES)),
    st.sampled_from([1, 2, 4]),
    st.sampled_from([(1, 1), (2, 1), (4, 1), (2, 2), (3, 2)]),
    st.integers(6, 9),
    st.booleans(),
    st.booleans(),
)
def test_the_ranks_hold_the_model_once(architecture, tensor, pipeline, layers, tied, reward):
    """Without copies, replicas and padding; what is padding is asked of the table's boxes."""
    config = tiny(architecture, layers, tied, reward)
    family = family_for(config)
    parallel = ParallelSettings(tensor=tensor, pipeline=pipeline[0], virtual_pipeline=pipeline[1])
    stages = range(math.prod(pipeline))
    held = 0
    names: list[str] = []
    for stage in stages:
        for shard in stage_shards(config, parallel, stage):
            names.append(shard.name)
            assert shard.shape == family.local_shape(shard.name, config, ShardGrid(tensor=tensor))
            for rank in range(1 if shard.replicated else tensor):
                boxes = family.pieces(shard.name, config, ShardGrid(tensor=tensor, rank=rank))
                assert shard.copy == any(piece.duplicate for piece in boxes) or not boxes
                held += sum(piece.hf_box.volume for piece in boxes if not piece.duplicate)
    assert len(names) == len(set(names))
    assert held == model_parameters(config)
    ranks = [rank_parameters(config, parallel, rank) for rank in range(pipeline[0])]
    every = [shard for stage in stages for shard in stage_shards(config, parallel, stage)]
    assert sum(rank.total for rank in ranks) == sum(shard.count for shard in every)
    assert sum(rank.norms for rank in ranks) == sum(shard.count for shard in every if "norm" in shard.name)


def test_a_tied_head_is_held_again_by_the_last_stage_only():
    config = tiny("LlamaForCausalLM", 4, tied=True, reward=False)
    whole = rank_parameters(config, ParallelSettings(), 0)
    first, last = (rank_parameters(config, ParallelSettings(pipeline=2), rank) for rank in range(2))
    assert whole.head == 0
    assert whole.total == model_parameters(config) + 4 * 64  # 100 entries are padded to 104
    assert last.head == first.embedding == 104 * 64
    assert first.total + last.total == whole.total + last.head


def test_a_reward_head_is_a_row_that_tensor_ranks_share():
    config = tiny("LlamaForCausalLM", 4, tied=False, reward=True)
    last = rank_parameters(config, ParallelSettings(tensor=2, pipeline=2), 1)
    assert last.head == 64
    head = stage_shards(config, ParallelSettings(tensor=2, pipeline=2), 1)[-1]
    assert (head.name, head.shape, head.replicated) == ("output_layer.weight", (1, 64), True)


def test_the_405b_model_by_hand():
    """126 layers of 4 matrices and 2 norms over PP14, one eighth of each; the embedding with its padding on the first rank."""
    layout = ParallelSettings(tensor=8, pipeline=14)
    config = content("llama3.1_405b")
    hidden, ffn, keys, layers = 16384, 53248, 1024, stage_layers(config, layout)
    layer = hidden * (hidden + 2 * keys) // 8 + hidden * hidden // 8 + 3 * hidden * ffn // 8
    assert layers == (9,) * 14
    for rank in range(14):
        held = rank_parameters(config, layout, rank)
        assert held.layers == 9 * layer
        assert held.norms == 9 * 2 * hidden + (hidden if rank == 13 else 0)
        assert held.embedding == (128256 // 8 * hidden if rank == 0 else 0)
        assert held.head == (128256 // 8 * hidden if rank == 13 else 0)
