"""Llama (LlamaForCausalLM): Tulu 3, Llama 2 and 3."""

from __future__ import annotations

from tulu_mega.bridge.rules import Config, Cut, Family, Rule, Shape, is_tied
from tulu_mega.errors import UserError

_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


def _groups(config: Config) -> int:
    return config.get("num_key_value_heads") or config["num_attention_heads"]


def _shapes(config: Config) -> dict[str, Shape]:
    given = {name: config.get(name) for name in _SIZES}
    given |= {name: config[name] for name in ("num_key_value_heads", "head_dim") if config.get(name) is not None}
    wrong = [
        f"config.json: {name} = {value!r}, expected a whole number from 1"
        for name, value in given.items()
        if isinstance(value, bool) or not isinstance(value, int) or value < 1
    ]
    wrong += [
        f"config.json: {name} = true is not supported; only Llama models without biases are"
        for name in ("attention_bias", "mlp_bias")
        if config.get(name)
    ]
    if not wrong:
        whole = [("num_attention_heads", "num_key_value_heads", _groups(config))]
        if config.get("head_dim") is None:
            whole.append(("hidden_size", "num_attention_heads", config["num_attention_heads"]))
        wrong += [
            f"config.json: {name} = {config[name]} is not a multiple of {by} = {parts}"
            for name, by, parts in whole
            if config[name] % parts
        ]
    if wrong:
        raise UserError(wrong)
    hidden, ffn, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    head_dim = config.get("head_dim") or hidden // heads
    layer = "model.layers.{i}."
    shapes = {
        "model.embed_tokens.weight": (config["vocab_size"], hidden),
        layer + "input_layernorm.weight": (hidden,),
        layer + "self_attn.q_proj.weight": (heads * head_dim, hidden),
        layer + "self_attn.k_proj.weight": (_groups(config) * head_dim, hidden),
        layer + "self_attn.v_proj.weight": (_groups(config) * head_dim, hidden),
        layer + "self_attn.o_proj.weight": (hidden, heads * head_dim),
        layer + "post_attention_layernorm.weight": (hidden,),
        layer + "mlp.gate_proj.weight": (ffn, hidden),
        layer + "mlp.up_proj.weight": (ffn, hidden),
        layer + "mlp.down_proj.weight": (hidden, ffn),
        "model.norm.weight": (hidden,),
        "lm_head.weight": (config["vocab_size"], hidden),
    }
    if is_tied(config):
        del shapes["lm_head.weight"]
    return shapes


def _rules() -> tuple[Rule, ...]:
    ours, theirs = "decoder.layers.{i}.", "model.layers.{i}."
    qkv = tuple(theirs + f"self_attn.{which}_proj.weight" for which in "qkv")
    gated = (theirs + "mlp.gate_proj.weight", theirs + "mlp.up_proj.weight")
    norm_1 = (ours + "input_layernorm.weight", ours + "self_attention.linear_qkv.layer_norm_weight")
    norm_2 = (ours + "pre_mlp_layernorm.weight", ours + "mlp.linear_fc1.layer_norm_weight")
    return (
        Rule(("embedding.word_embeddings.weight",), ("model.embed_tokens.weight",), Cut.VOCAB),
        Rule(norm_1, (theirs + "input_layernorm.weight",), Cut.COPY),
        Rule((ours + "self_attention.linear_qkv.weight",), qkv, Cut.QKV),
        Rule((ours + "self_attention.linear_proj.weight",), (theirs + "self_attn.o_proj.weight",), Cut.ROW),
        Rule(norm_2, (theirs + "post_attention_layernorm.weight",), Cut.COPY),
        Rule((ours + "mlp.linear_fc1.weight",), gated, Cut.GATED),
        Rule((ours + "mlp.linear_fc2.weight",), (theirs + "mlp.down_proj.weight",), Cut.ROW),
        Rule(("decoder.final_layernorm.weight",), ("model.norm.weight",), Cut.COPY),
        Rule(("output_layer.weight",), ("lm_head.weight",), Cut.VOCAB),
    )


FAMILY = Family(
    architecture="LlamaForCausalLM",
    rules=_rules(),
    shapes=_shapes,
    groups=_groups,
    leftovers=("*.rotary_emb.inv_freq",),
)
