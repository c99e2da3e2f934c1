"""The rule table: pieces of all ranks cover every tensor once, tile every shard, and bring back the same bits."""

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tulu_mega.bridge.families import FAMILIES, family_for
from tulu_mega.bridge.rules import Cut, is_weight, padded_vocab
from tulu_mega.errors import UserError

LLAMA = FAMILIES["LlamaForCausalLM"]


@st.composite
def layouts(draw):
    """(config, tp) that Megatron accepts: TP divides heads and ffn, and divides the groups or is a multiple of them."""
    tp = draw(st.sampled_from([1, 2, 3, 4, 8]))
    groups = draw(st.sampled_from([1, 2, 3, 4, 8]))
    heads = groups * draw(st.integers(1, 4))
    assume(heads % tp == 0 and (groups % tp == 0 or tp % groups == 0))
    head_dim = draw(st.sampled_from([2, 4, 6]))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": draw(st.integers(1, 70)),
        "hidden_size": draw(st.integers(1, 9)),
        "intermediate_size": tp * draw(st.integers(1, 5)),
        "num_hidden_layers": draw(st.integers(1, 3)),
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "head_dim": head_dim,
        "tie_word_embeddings": draw(st.booleans()),
    }
    assume((heads + 2 * groups) * head_dim % tp == 0)
    return config, tp


def megatron_names(config, spec):
    ends = ["embedding.word_embeddings.weight", "decoder.final_layernorm.weight", "output_layer.weight"]
    norms = {
        "local": ["input_layernorm.weight", "pre_mlp_layernorm.weight"],
        "te": ["self_attention.linear_qkv.layer_norm_weight", "mlp.linear_fc1.layer_norm_weight"],
    }[spec]
    matrices = [
        "self_attention.linear_qkv.weight",
        "self_attention.linear_proj.weight",
        "mlp.linear_fc1.weight",
        "mlp.linear_fc2.weight",
    ]
    return ends + [f"decoder.layers.{i}.{name}" for i in range(config["num_hidden_layers"]) for name in norms + matrices]


def cut_of(name):
    return LLAMA._rule(name, {"num_hidden_layers": 10})[0].cut


def box(region):
    return tuple(slice(*each) for each in region)


@settings(max_examples=60, deadline=None)
@given(layouts(), st.sampled_from(["local", "te"]))
def test_pieces_cover_tile_and_return_the_same_bits(layout, spec):
    config, tp = layout
    shapes = LLAMA.hf_shapes(config)
    rng = np.random.default_rng(0)
    tensors = {name: rng.standard_normal(shape) for name, shape in shapes.items()}
    back = {name: np.full(shape, np.nan) for name, shape in shapes.items()}
    times = {name: np.zeros(shape, int) for name, shape in shapes.items()}
    for name in megatron_names(config, spec):
        for rank in range(tp):
            shard = np.full(LLAMA.local_shape(name, tp, config), np.nan)
            filled = np.zeros(shard.shape, int)
            for piece in LLAMA.pieces(name, rank, tp, config):
                shard[box(piece.local_region)] = tensors[piece.hf_name][box(piece.hf_region)]
                filled[box(piece.local_region)] += 1
                assert piece.duplicate == (name == "output_layer.weight" and config["tie_word_embeddings"])
                if not piece.duplicate:
                    back[piece.hf_name][box(piece.hf_region)] = shard[box(piece.local_region)]
                    times[piece.hf_name][box(piece.hf_region)] += 1
            assert filled.max(initial=0) <= 1
            if cut_of(name) is Cut.VOCAB:  # what is not filled is padding, at the end of the vocabulary
                real = max(0, min(len(shard), config["vocab_size"] - rank * len(shard)))
                assert filled[:real].all() and not filled[real:].any()
            else:
                assert filled.all()
    copied = {f"model.layers.{i}.{n}_layernorm.weight" for i in range(3) for n in ("input", "post_attention")} | {
        "model.norm.weight"
    }
    for name in shapes:
        assert (times[name] == (tp if name in copied else 1)).all(), name
        np.testing.assert_array_equal(back[name], tensors[name])


@settings(max_examples=40, deadline=None)
@given(layouts())
def test_qkv_shards_concatenate_to_the_interleaved_matrix(layout):
    """Against the definition: per group its queries, its key, its value, and TP takes equal runs of rows of that."""
    config, tp = layout
    groups = config["num_key_value_heads"]
    prefix = "model.layers.0.self_attn."
    tensors = {name: np.arange(np.prod(shape)).reshape(shape) for name, shape in LLAMA.hf_shapes(config).items()}
    q, k, v = (tensors[f"{prefix}{which}_proj.weight"] for which in "qkv")
    by_group = [matrix.reshape(groups, len(matrix) // groups, -1) for matrix in (q, k, v)]
    expected = np.split(np.concatenate(by_group, axis=1).reshape(-1, config["hidden_size"]), tp)
    name = "decoder.layers.0.self_attention.linear_qkv.weight"
    for rank in range(tp):
        got = np.concatenate([tensors[p.hf_name][box(p.hf_region)] for p in LLAMA.pieces(name, rank, tp, config)])
        np.testing.assert_array_equal(got, expected[rank])


CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 20,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def test_worked_example_of_a_piece():
    pieces = LLAMA.pieces("decoder.layers.1.self_attention.linear_qkv.weight", 1, 2, CONFIG)
    assert [(p.hf_name.split(".")[-2], p.hf_region[0], p.local_region[0]) for p in pieces] == [
        ("q_proj", (4, 8), (0, 4)),
        ("k_proj", (2, 4), (4, 6)),
        ("v_proj", (2, 4), (6, 8)),
    ]
    assert {p.hf_name.split(".")[2] for p in pieces} == {"1"}


def test_gated_mlp_stacks_the_gate_share_on_the_up_share():
    gate, up = LLAMA.pieces("decoder.layers.0.mlp.linear_fc1.weight", 1, 3, CONFIG)
    assert gate.hf_name.endswith("0.mlp.gate_proj.weight") and up.hf_name.endswith("0.mlp.up_proj.weight")
    assert gate.hf_region == up.hf_region == ((4, 8), (0, 8))
    assert (gate.local_region, up.local_region) == (((0, 4), (0, 8)), ((4, 8), (0, 8)))


@pytest.mark.parametrize(("vocab", "tp", "padded"), [(128256, 8, 128256), (128257, 8, 128320), (50257, 1, 50264), (1, 2, 16)])
def test_padded_vocab(vocab, tp, padded):
    assert padded_vocab(vocab, tp) == padded


def test_a_tied_head_is_no_tensor_of_its_own_and_a_left_over_one_is_fine():
    tied = {**CONFIG, "tie_word_embeddings": True}
    assert "lm_head.weight" in LLAMA.hf_shapes(CONFIG) and "lm_head.weight" not in LLAMA.hf_shapes(tied)
    assert "lm_head.weight" in LLAMA.ignorable(tied) and "lm_head.weight" not in LLAMA.ignorable(CONFIG)


def test_transformer_engine_state_is_no_weight():
    assert not is_weight("decoder.layers.0.mlp.linear_fc1._extra_state") and is_weight("output_layer.weight")


@pytest.mark.parametrize(
    ("name", "tp", "says"),
    [
        ("decoder.layers.0.mlp.linear_fc1.bias", 1, "linear_fc1.bias: LlamaForCausalLM has no such parameter"),
        ("decoder.layers.2.mlp.linear_fc1.weight", 1, "num_hidden_layers = 2"),
        ("decoder.layers.0.mlp.linear_fc2.weight", 5, "12 rows or columns do not divide by a tensor parallel size of 5"),
    ],
)
def test_what_the_table_cannot_place_is_refused(name, tp, says):
    with pytest.raises(UserError, match=says.replace(".", r"\.")):
        LLAMA.pieces(name, 0, tp, CONFIG)


def test_an_unknown_family_names_the_known():
    with pytest.raises(UserError, match=r"MistralForCausalLM.*not supported; expected one of LlamaForCausalLM"):
        family_for({"architectures": ["MistralForCausalLM"]})
    with pytest.raises(UserError, match="expected one of LlamaForCausalLM"):
        family_for({})
    assert family_for(CONFIG) is LLAMA


def test_a_config_that_cannot_be_read_tells_everything_at_once():
    broken = {**CONFIG, "hidden_size": "8", "vocab_size": None, "mlp_bias": True, "num_key_value_heads": 0}
    with pytest.raises(UserError) as caught:
        LLAMA.hf_shapes(broken)
    told = "\n".join(caught.value.problems)
    assert len(caught.value.problems) == 4
    assert all(word in told for word in ("hidden_size = '8'", "vocab_size = None", "mlp_bias = true", "num_key_value_heads = 0"))
    with pytest.raises(UserError, match="num_attention_heads = 4 is not a multiple of num_key_value_heads = 3"):
        LLAMA.hf_shapes({**CONFIG, "num_key_value_heads": 3})
