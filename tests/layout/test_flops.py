"""FLOPs against the published shapes of Llama 3.1 and against counting a real model's parameters."""

from __future__ import annotations

import pytest

from tulu_mega.layout.flops import matmul_parameters, training_flops


def llama(hidden, ffn, layers, heads, groups=8, vocab=128256):
    return {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "vocab_size": vocab,
    }


@pytest.mark.parametrize(
    ("config", "gigaflops"),
    [(llama(4096, 14336, 32, 32), 51.5), (llama(8192, 28672, 80, 64), 449), (llama(16384, 53248, 126, 128), 2524)],
    ids=["8B", "70B", "405B"],
)
def test_flops_of_a_token_at_8k(config, gigaflops):
    assert training_flops(config, [8192]) / 8192 / 1e9 == pytest.approx(gigaflops, rel=2e-3)


def test_attention_counts_each_sequence_by_itself():
    config = llama(64, 128, 2, 4, groups=2, vocab=100)
    linear = 6 * matmul_parameters(config)
    assert training_flops(config, [10, 30]) == linear * 40 + 6 * 2 * 64 * (10**2 + 30**2)
    assert training_flops(config, []) == 0


def test_frozen_weights_have_no_gradients():
    config = llama(64, 128, 2, 4, groups=2, vocab=100)
    work = training_flops(config, [10, 30]) - training_flops(config, [10, 30], frozen=True)
    assert work == 2 * matmul_parameters(config) * 40  # attention, which has no weights, is as before


def test_a_window_bounds_what_a_token_attends_to():
    """Against counting the pairs; the closed form leaves out half a token on the diagonal, as for full attention."""
    config = llama(64, 128, 3, 4, groups=2, vocab=100)
    windowed = config | {"architectures": ["Qwen3ForCausalLM"], "use_sliding_window": True, "sliding_window": 10, "head_dim": 16}
    layer_types = ["full_attention", "sliding_attention", "sliding_attention"]
    less = training_flops(config, [40, 9]) - training_flops(windowed | {"layer_types": layer_types}, [40, 9])
    hidden_pairs = sum(max(0, token - 9) for token in range(40))  # of one layer: further back than the window
    assert less == pytest.approx(2 * 12 * 64 * hidden_pairs, rel=0.05)
    assert training_flops(windowed | {"layer_types": layer_types}, [9, 10]) == training_flops(config, [9, 10])


@pytest.mark.parametrize("tied", [False, True])
def test_parameters_are_those_of_transformers(tied):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**llama(64, 128, 2, 4, groups=2, vocab=96), head_dim=24, tie_word_embeddings=tied)
    model = LlamaForCausalLM(config)
    matrices = sum(p.numel() for name, p in model.named_parameters() if p.dim() == 2 and "embed_tokens" not in name)
    head = 64 * 96 if tied else 0  # tied, the embedding's matrix is the head's too
    assert matmul_parameters(config.to_dict()) == matrices + head


def test_a_reward_model_has_one_column_instead_of_a_vocabulary():
    policy = llama(4096, 14336, 32, 32)
    reward = policy | {"architectures": ["LlamaForSequenceClassification"], "num_labels": 1}
    assert matmul_parameters(policy) - matmul_parameters(reward) == 4096 * (128256 - 1)
