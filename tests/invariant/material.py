"""A tiny Llama, its tokenizer and rows to train it on, made by seeded code that uses neither torch nor the package."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

HEADS, KEY_VALUE_HEADS, LAYERS, VOCABULARY = 4, 2, 2, 264
EOS = "<|end_of_text|>"
WORDS = "red green blue one two three cat dog house tree river stone over under near far".split()


def make_model(directory: Path, hidden: int = 32, spread: float = 0.1) -> Path:
    """Writes a model of random float32 weights and a tokenizer of bytes.

    Args:
        hidden: width; the feed-forward layers are twice as wide.
        spread: standard deviation of the weights.
    """
    directory.mkdir(parents=True)
    head, wide = hidden // HEADS, 2 * hidden
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCABULARY,
        "hidden_size": hidden,
        "intermediate_size": wide,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KEY_VALUE_HEADS,
        "head_dim": head,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
        "bos_token_id": None,
        "eos_token_id": 0,
        "torch_dtype": "float32",
    }
    shapes = {"model.embed_tokens.weight": (VOCABULARY, hidden)}
    for layer in range(LAYERS):
        at = f"model.layers.{layer}"
        shapes |= {
            f"{at}.input_layernorm.weight": (hidden,),
            f"{at}.self_attn.q_proj.weight": (HEADS * head, hidden),
            f"{at}.self_attn.k_proj.weight": (KEY_VALUE_HEADS * head, hidden),
            f"{at}.self_attn.v_proj.weight": (KEY_VALUE_HEADS * head, hidden),
            f"{at}.self_attn.o_proj.weight": (hidden, HEADS * head),
            f"{at}.post_attention_layernorm.weight": (hidden,),
            f"{at}.mlp.gate_proj.weight": (wide, hidden),
            f"{at}.mlp.up_proj.weight": (wide, hidden),
            f"{at}.mlp.down_proj.weight": (hidden, wide),
        }
    shapes |= {"model.norm.weight": (hidden,), "lm_head.weight": (VOCABULARY, hidden)}
    draw = np.random.Generator(np.random.PCG64(0))
    tensors = {
        name: (draw.standard_normal(shape) * spread + (len(shape) == 1)).astype(np.float32) for name, shape in shapes.items()
    }
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    write_json(directory / "config.json", config)

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={token: number for number, token in enumerate([EOS, *alphabet])}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.save(str(directory / "tokenizer.json"))
    write_json(directory / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": EOS})
    return directory


def conversations(count: int) -> list[dict[str, Any]]:
    """Rows of one to three turns of different lengths."""
    draw = random.Random("conversations")
    rows = []
    for _ in range(count):
        turns = draw.randint(1, 3)
        pairs = [[_message("user", _text(draw, 6)), _message("assistant", _text(draw, 5))] for _ in range(turns)]
        rows.append({"messages": [message for pair in pairs for message in pair]})
    return rows


def pairs(count: int) -> list[dict[str, Any]]:
    """Rows of a chosen and a rejected answer to the same question."""
    draw = random.Random("pairs")
    rows = []
    for _ in range(count):
        asked = _message("user", _text(draw, 6))
        rows.append({side: [asked, _message("assistant", _text(draw, 5))] for side in ("chosen", "rejected")})
    return rows


def prompts(count: int, verifier: str) -> list[dict[str, Any]]:
    """Rows of a question that a verifier judges the answers to."""
    draw = random.Random("prompts")
    return [{"messages": [_message("user", _text(draw, 4))], "ground_truth": "", "dataset": verifier} for _ in range(count)]


def write_rows(file: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def write_json(file: Path, content: Any) -> None:
    file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _text(draw: random.Random, most: int) -> str:
    return " ".join(draw.choice(WORDS) for _ in range(draw.randint(1, most)))
