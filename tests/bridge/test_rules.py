"""The rule table: pieces of all ranks cover every tensor once, tile every shard, and bring back the same bits."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tulu_mega.bridge.families import FAMILIES, REWARD_FAMILIES, decoder, family_for
from tulu_mega.bridge.rules import Cut, Family, LayerNeeds, is_weight, padded_vocab
from tulu_mega.distributed.grid import ShardGrid
from tulu_mega.errors import UserError

LLAMA, QWEN_3 = FAMILIES["LlamaForCausalLM"], FAMILIES["Qwen3ForCausalLM"]
EVERY = tuple(FAMILIES.values())


@st.composite
def layouts(draw, families=EVERY):
    """(family, config, tp) that Megatron accepts: TP divides heads and ffn, and divides the groups or is a multiple of them."""
    tp = draw(st.sampled_from([1, 2, 3, 4, 8]))
    groups = draw(st.sampled_from([1, 2, 3, 4, 8]))
    heads = groups * draw(st.integers(1, 4))
    assume(heads % tp == 0 and (groups % tp == 0 or tp % groups == 0))
    head_dim = draw(st.sampled_from([2, 4, 6]))
    family = draw(st.sampled_from(families))
    config = {
        "architectures": [family.architecture],
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
    assume(groups % tp == 0 or decoder.PROJECTION_NORMS[0] not in family.rules)  # a norm over the projection needs whole heads
    return family, config, tp


def megatron_names(family, config, spec):
    """Every parameter's name with megatron-core's layers or Transformer Engine's."""
    patterns = [rule.megatron[{"local": 0, "te": -1}[spec]] for rule in family.rules]
    layers = range(config["num_hidden_layers"])
    return [name.format(i=i) for name in patterns for i in (layers if "{i}" in name else (0,))]


def cut_of(family, name):
    return family.rule(name, {"num_hidden_layers": 10})[0].cut


@settings(max_examples=60, deadline=None)
@given(layouts(), st.sampled_from(["local", "te"]))
def test_pieces_cover_tile_and_return_the_same_bits(layout, spec):
    family, config, tp = layout
    shapes = family.hf_shapes(config)
    rng = np.random.default_rng(0)
    tensors = {name: rng.standard_normal(shape) for name, shape in shapes.items()}
    back = {name: np.full(shape, np.nan) for name, shape in shapes.items()}
    times = {name: np.zeros(shape, int) for name, shape in shapes.items()}
    for name in megatron_names(family, config, spec):
        for rank in range(tp):
            shard = np.full(family.local_shape(name, config, ShardGrid(tensor=tp)), np.nan)
            filled = np.zeros(shard.shape, int)
            for piece in family.pieces(name, config, ShardGrid(tensor=tp, rank=rank)):
                shard[piece.local_box.slices] = tensors[piece.hf_name][piece.hf_box.slices]
                filled[piece.local_box.slices] += 1
                assert piece.duplicate == (name == "output_layer.weight" and config["tie_word_embeddings"])
                if not piece.duplicate:
                    back[piece.hf_name][piece.hf_box.slices] = shard[piece.local_box.slices]
                    times[piece.hf_name][piece.hf_box.slices] += 1
            assert filled.max(initial=0) <= 1
            if cut_of(family, name) is Cut.VOCAB:  # what is not filled is padding, at the end of the vocabulary
                real = max(0, min(len(shard), config["vocab_size"] - rank * len(shard)))
                assert filled[:real].all() and not filled[real:].any()
            else:
                assert filled.all()
    copied = [name.format(i=i) for rule in family.rules if rule.cut is Cut.COPY for name in rule.hf for i in range(3)]
    for name in shapes:
        assert (times[name] == (tp if name in copied else 1)).all(), name
        np.testing.assert_array_equal(back[name], tensors[name])


@settings(max_examples=40, deadline=None)
@given(layouts((FAMILIES["Qwen2ForCausalLM"],)), st.sampled_from(["weight", "bias"]))
def test_qkv_shards_concatenate_to_the_interleaved_whole(layout, kind):
    """Against the definition: per group its queries, its key, its value, and TP takes equal runs of rows of that."""
    family, config, tp = layout
    groups = config["num_key_value_heads"]
    prefix = "model.layers.0.self_attn."
    tensors = {name: np.arange(np.prod(shape)).reshape(shape) for name, shape in family.hf_shapes(config).items()}
    q, k, v = (tensors[f"{prefix}{which}_proj.{kind}"] for which in "qkv")
    by_group = [rows.reshape(groups, len(rows) // groups, *rows.shape[1:]) for rows in (q, k, v)]
    expected = np.split(np.concatenate(by_group, axis=1).reshape(-1, *q.shape[1:]), tp)
    name = f"decoder.layers.0.self_attention.linear_qkv.{kind}"
    for rank in range(tp):
        pieces = family.pieces(name, config, ShardGrid(tensor=tp, rank=rank))
        got = np.concatenate([tensors[piece.hf_name][piece.hf_box.slices] for piece in pieces])
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
    pieces = LLAMA.pieces("decoder.layers.1.self_attention.linear_qkv.weight", CONFIG, ShardGrid(tensor=2, rank=1))
    assert [(p.hf_name.split(".")[-2], p.hf_box[0], p.local_box[0]) for p in pieces] == [
        ("q_proj", (4, 8), (0, 4)),
        ("k_proj", (2, 4), (4, 6)),
        ("v_proj", (2, 4), (6, 8)),
    ]
    assert {p.hf_name.split(".")[2] for p in pieces} == {"1"}


def test_gated_mlp_stacks_the_gate_share_on_the_up_share():
    gate, up = LLAMA.pieces("decoder.layers.0.mlp.linear_fc1.weight", CONFIG, ShardGrid(tensor=3, rank=1))
    assert gate.hf_name.endswith("0.mlp.gate_proj.weight") and up.hf_name.endswith("0.mlp.up_proj.weight")
    assert gate.hf_box == up.hf_box == ((4, 8), (0, 8))
    assert (gate.local_box, up.local_box) == (((0, 4), (0, 8)), ((4, 8), (0, 8)))


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
        LLAMA.pieces(name, CONFIG, ShardGrid(tensor=tp))


def test_an_unknown_family_names_the_known():
    with pytest.raises(UserError, match=r"GemmaForCausalLM.*not supported; expected one of .*Llama.*MistralForCausalLM"):
        family_for({"architectures": ["GemmaForCausalLM"]})
    with pytest.raises(UserError, match=r"expected one of .*LlamaForCausalLM"):
        family_for({})
    assert family_for(CONFIG) is LLAMA


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("architecture", FAMILIES)
def test_the_tensors_are_those_of_transformers(architecture, tied):
    import torch
    import transformers

    model = getattr(transformers, architecture)
    sizes = {name: size for name, size in CONFIG.items() if name != "architectures"}
    config = model.config_class(**sizes, head_dim=6, tie_word_embeddings=tied, pad_token_id=None)
    with torch.device("meta"):
        theirs = {name: tuple(tensor.shape) for name, tensor in model(config).state_dict().items()}
    if tied:
        del theirs["lm_head.weight"]
    assert FAMILIES[architecture].hf_shapes(config.to_dict()) == theirs


def needs(architecture, **config):
    return FAMILIES[architecture].needs(CONFIG | {"num_hidden_layers": 4} | config)


def test_needs_follow_from_what_config_json_says():
    sliding = dict(use_sliding_window=True, sliding_window=9)
    assert needs("LlamaForCausalLM") == LayerNeeds()
    assert needs("MistralForCausalLM", sliding_window=None) == LayerNeeds()
    assert needs("MistralForCausalLM", sliding_window=9) == LayerNeeds(window=9, windowed=(True,) * 4)
    assert needs("Qwen2ForCausalLM", sliding_window=9) == LayerNeeds(qkv_bias=True)  # there, but not used
    late = LayerNeeds(qkv_bias=True, window=9, windowed=(False, False, False, True))
    assert needs("Qwen2ForCausalLM", **sliding, max_window_layers=3) == late
    assert needs("Qwen2ForCausalLM", **sliding, max_window_layers=4) == LayerNeeds(qkv_bias=True)
    chosen = ["sliding_attention", "full_attention", "full_attention", "sliding_attention"]
    by_layer = LayerNeeds(qk_norm="head", window=9, windowed=(True, False, False, True))
    assert needs("Qwen3ForCausalLM", **sliding, layer_types=chosen) == by_layer
    assert needs("Olmo2ForCausalLM") == LayerNeeds(qk_norm="projection", norms="after")
    olmo3 = needs("Olmo3ForCausalLM")  # neither window nor layer types in config.json: as transformers has it
    assert (olmo3.window, olmo3.windowed) == (4096, (True, True, True, False))
    assert olmo3.ropes == ("sliding_attention",) * 3 + ("full_attention",)


@pytest.mark.parametrize("architecture", ["MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "Olmo3ForCausalLM"])
def test_needs_are_those_of_transformers_defaults(architecture):
    """What config.json does not say is the same here as in the config that transformers makes of it."""
    import transformers

    plain = {name: size for name, size in CONFIG.items() if name != "architectures"} | {"num_hidden_layers": 30, "head_dim": 6}
    made = getattr(transformers, architecture).config_class(**plain, pad_token_id=None).to_dict()
    assert FAMILIES[architecture].needs(plain) == FAMILIES[architecture].needs(made)
    assert FAMILIES[architecture].sizes(plain) == FAMILIES[architecture].sizes(made)


@pytest.mark.parametrize(
    ("architecture", "config", "says"),
    [
        ("MistralForCausalLM", {"sliding_window": 0}, "sliding_window = 0, expected a whole number of tokens from 1"),
        ("Olmo3ForCausalLM", {"layer_types": ["full_attention"]}, "layer_types names 1 layers, expected num_hidden_layers = 2"),
        ("Olmo3ForCausalLM", {"layer_types": ["full_attention", "linear"]}, "layer_types has linear, expected full_attention or"),
        ("Qwen3ForCausalLM", {}, "head_dim = None, expected a whole number"),
        ("Qwen2ForCausalLM", {"num_key_value_heads": None}, "num_key_value_heads = None, expected a whole number"),
        (
            "Qwen2ForCausalLM",
            {"rope_scaling": {"type": "mrope", "mrope_section": [1]}},
            "rope_scaling asks for rope_type 'mrope'",
        ),
        (
            "Olmo3ForCausalLM",
            {"rope_parameters": {"full_attention": {"rope_type": "dynamic"}}},
            "rope_type 'dynamic', which is not",
        ),
        ("LlamaForCausalLM", {"rope_scaling": "yarn"}, "rope_scaling = 'yarn', expected an object"),
        ("LlamaForCausalLM", {"hidden_act": "gelu"}, "hidden_act = 'gelu' is not supported; expected 'silu'"),
        ("LlamaForCausalLM", {"quantization_config": {"quant_method": "fp8"}}, "quantization_config says that the weights are"),
        ("LlamaForCausalLM", {"logit_scale": 0.5}, "logit_scale = 0.5 is not supported: vLLM would scale logits by it"),
        ("LlamaForCausalLM", {"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5 is not supported"),
        ("LlamaForCausalLM", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor = 0.5, which is not"),
        (
            "LlamaForCausalLM", {"rope_parameters": {"rope_type": "default"}, "rope_scaling": {"type": "longrope"}},
            "rope_scaling asks for rope_type 'longrope'",
        ),
    ],
)
def test_layers_that_cannot_be_built_are_refused_with_the_files(architecture, config, says):
    with pytest.raises(UserError, match=says):
        FAMILIES[architecture].hf_shapes(CONFIG | config)


def test_a_config_that_cannot_be_read_tells_everything_at_once():
    broken = {**CONFIG, "hidden_size": "8", "vocab_size": None, "mlp_bias": True, "num_key_value_heads": 0}
    with pytest.raises(UserError) as caught:
        LLAMA.hf_shapes(broken)
    told = "\n".join(caught.value.problems)
    assert len(caught.value.problems) == 4
    assert all(word in told for word in ("hidden_size = '8'", "vocab_size = None", "mlp_bias = true", "num_key_value_heads = 0"))
    with pytest.raises(UserError, match="num_attention_heads = 4 is not a multiple of num_key_value_heads = 3"):
        LLAMA.hf_shapes({**CONFIG, "num_key_value_heads": 3})


def test_the_family_of_the_documentation_is_one():
    docs = Path(__file__).parents[2] / "docs"
    made = {}
    exec((docs / "how-to/add_a_family.md").read_text().split("```python\n")[1].split("```")[0], made)
    config = CONFIG | {"head_dim": 6}
    shapes = made["FAMILY"].hf_shapes(config)
    beside = {"q_proj.bias": (24,), "k_proj.bias": (12,), "v_proj.bias": (12,)}
    expected = FAMILIES["Qwen3ForCausalLM"].hf_shapes(config)
    expected |= {f"model.layers.{i}.self_attn.{name}": shape for i in range(2) for name, shape in beside.items()}
    assert shapes == expected
    page = (docs / "reference/families.md").read_text()
    listed = [line.split("`")[1] for line in page.splitlines() if "ForCausalLM` |" in line]
    assert sorted(listed) == sorted(FAMILIES)


@pytest.mark.parametrize(("end", "known"), [("ForCausalLM", FAMILIES), ("ForSequenceClassification", REWARD_FAMILIES)])
def test_a_config_of_two_families_is_refused(end, known):
    """transformers would build the one, we the other."""
    for architecture, family in known.items():
        kind = architecture.removesuffix(end).lower()
        assert family_for({"architectures": [architecture], "model_type": kind}) is family
        with pytest.raises(UserError, match=f"architectures = {architecture}, but model_type = 'gemma', expected '{kind}'"):
            family_for({"architectures": [architecture], "model_type": "gemma"})


def _example() -> Family:
    """The family that docs/how-to/add_a_family.md writes, which Qwen 3 with biases is."""
    page = (Path(__file__).parents[2] / "docs/how-to/add_a_family.md").read_text(encoding="utf-8")
    written: dict[str, Any] = {}
    exec(page.partition("```python\n")[2].partition("```")[0], written)
    return written["FAMILY"]


def test_the_family_of_the_how_to_is_one():
    config = {
        "architectures": ["NewForCausalLM"], "attention_bias": True, "vocab_size": 32, "hidden_size": 8, "intermediate_size": 16,
        "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 2,
    }  # fmt: skip
    shapes, biases = _example().hf_shapes(config), {f"model.layers.0.self_attn.{each}_proj.bias" for each in "qkv"}
    assert shapes.keys() - QWEN_3.hf_shapes({**config, "attention_bias": False}).keys() == biases
    with pytest.raises(UserError, match="attention_bias = true is not supported"):
        QWEN_3.hf_shapes(config)
    with pytest.raises(UserError, match="mlp_bias = true is not supported"):
        _example().hf_shapes({**config, "mlp_bias": True})


def test_a_family_may_have_a_model_type_unlike_its_architecture(monkeypatch):
    """Seed-OSS's is `seed_oss`, where the architecture is SeedOssForCausalLM."""
    made = replace(LLAMA, architecture="NewOneForCausalLM", model_type="new_one")
    monkeypatch.setitem(FAMILIES, made.architecture, made)
    assert family_for({"architectures": ["NewOneForCausalLM"], "model_type": "new_one"}) is made
    with pytest.raises(UserError, match="model_type = 'newone', expected 'new_one'"):
        family_for({"architectures": ["NewOneForCausalLM"], "model_type": "newone"})
