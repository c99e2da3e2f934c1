"""Layers over pipeline stages: even where it goes, else levelled with the head counted in."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tulu_mega.config import ParallelSettings
from tulu_mega.errors import UserError
from tulu_mega.layout.division import layout_problems
from tulu_mega.layout.stages import split_layers, stage_layers

LLAMA_405B = dict(
    hidden_size=16384, intermediate_size=53248, num_hidden_layers=126, num_attention_heads=128, num_key_value_heads=8,
    vocab_size=128256, architectures=["LlamaForCausalLM"],
)  # fmt: skip


@pytest.mark.parametrize(
    ("layout", "stages"),
    [
        ({"pipeline": 14}, [9] * 14),
        ({"pipeline": 18}, [7] * 18),
        ({"pipeline": 16}, [7] + [8] * 14 + [7]),  # as Llama 3 was trained: one fewer on the first and on the last
        ({"pipeline": 8}, [15] + [16] * 6 + [15]),
        ({"pipeline": 7, "virtual_pipeline": 3}, [6] * 21),
        ({"pipeline": 8, "first_stage_layers": 14, "last_stage_layers": 16}, [14] + [16] * 6 + [16]),
        ({"pipeline": 16, "virtual_pipeline": 8, "first_stage_layers": 8, "last_stage_layers": 8}, None),
    ],
    ids=str,
)
def test_126_layers(layout, stages):
    if stages is None:  # 112 middle stages and two layers fewer than one each
        with pytest.raises(UserError, match=r"126 .* 16 x .* 8 stages with .*first_stage_layers = 8.*: every stage needs one"):
            stage_layers(LLAMA_405B, ParallelSettings(**layout))
    else:
        assert list(stage_layers(LLAMA_405B, ParallelSettings(**layout))) == stages


def test_an_interleaved_split_levels_ranks_before_chunks():
    split = stage_layers(LLAMA_405B, ParallelSettings(pipeline=16, virtual_pipeline=2))
    ranks = [sum(split[rank::16]) for rank in range(16)]
    assert ranks == [7] + [8] * 14 + [7] and max(split) == 4 and min(split) == 3


@settings(max_examples=300, deadline=None)
@given(data=st.data(), ranks=st.integers(2, 5), chunks=st.integers(1, 2), head=st.sampled_from([0.0, 0.3, 1.0, 4.5]))
def test_a_split_holds_every_layer_and_no_other_is_faster(data, ranks, chunks, head):
    layers = data.draw(st.integers(ranks * chunks, 14))
    split = split_layers(layers, ranks, chunks, head=head)
    assert len(split) == ranks * chunks and sum(split) == layers and min(split) >= 1
    if layers % (ranks * chunks) == 0:
        assert len(set(split)) == 1
        return

    def slowest(counts):
        return max(count + head * (rank == ranks - 1) for rank, count in enumerate(counts))

    others = (c for c in itertools.product(range(chunks, layers + 1), repeat=ranks) if sum(c) == layers)
    assert slowest([sum(split[rank::ranks]) for rank in range(ranks)]) == min(map(slowest, others))
    for rank in range(ranks):  # a rank's chunks differ by a layer at most, the head aside
        mine = split[rank::ranks]
        if rank < ranks - 1:
            assert max(mine) - min(mine) <= 1


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((3, 4), "num_hidden_layers = 3 cannot be split over parallel.pipeline = 4"),
        ((8, 2, 1, 3, 4), "first_stage_layers = 3 and parallel.last_stage_layers = 4: these are 7; leave one"),
        ((8, 3, 1, 8), "every stage needs one"),
    ],
)
def test_what_cannot_be_split(arguments, says):
    layers, ranks, *rest = arguments
    chunks, first, last = [*rest, *[1, None, None][len(rest) :]]
    with pytest.raises(UserError, match=says):
        split_layers(layers, ranks, chunks, first=first, last=last)


def test_a_reward_model_s_last_stage_has_no_vocabulary_to_make_up_for():
    reward = LLAMA_405B | {"architectures": ["LlamaForSequenceClassification"], "num_labels": 1, "vocab_size": 4_000_000}
    policy = reward | {"architectures": ["LlamaForCausalLM"]}
    split = ParallelSettings(pipeline=16)
    assert set(stage_layers(reward, split)) == {7, 8}
    assert stage_layers(policy, split)[-1] < 7


def test_preflight_tells_of_too_few_layers():
    model = {**LLAMA_405B, "num_hidden_layers": 4}
    assert layout_problems(model, ParallelSettings(pipeline=3, context=2)) == []
    (told,) = layout_problems(model, ParallelSettings(pipeline=3, virtual_pipeline=2))
    assert "num_hidden_layers = 4" in told and "choose fewer stages" in told


@pytest.mark.parametrize("layout", [{"pipeline": 8}, {"pipeline": 16, "virtual_pipeline": 2}], ids=str)
def test_megatron_core_builds_the_same_split(layout, monkeypatch):
    from megatron.core import parallel_state
    from transformers import LlamaConfig

    from tulu_mega.config import EngineSettings
    from tulu_mega.model.config import transformer_config

    settings = EngineSettings(model="unread", parallel=ParallelSettings(**layout))
    config = transformer_config(LlamaConfig(**LLAMA_405B), settings, transformer_engine=False)
    chunks = layout.get("virtual_pipeline", 1)
    monkeypatch.setattr(parallel_state, "_VIRTUAL_PIPELINE_MODEL_PARALLEL_WORLD_SIZE", chunks if chunks > 1 else None)
    split, done = stage_layers(LLAMA_405B, settings.parallel), 0
    for stage, count in enumerate(split):
        where = dict(vp_stage=stage // layout["pipeline"], pp_rank=stage % layout["pipeline"])
        assert config.pipeline_model_parallel_layout.get_num_layers_to_build(**where) == count
        assert config.pipeline_model_parallel_layout.get_layer_offset(**where) == done
        done += count
    assert done == 126
