"""Small random models of every family, as transformers makes and saves them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests.lib import jobs
from tests.lib.checkpoints import save
from tulu_mega.config import OptimSettings
from tulu_mega.train import checkpoint

YARN = {
    "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 8.0,
}  # fmt: skip
PLAIN = {"rope_type": "default", "rope_theta": 10000.0}
WINDOW = 12
"""shorter than most of `jobs.LENGTHS`"""
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "Qwen 2": ("Qwen2", {"tie_word_embeddings": True, "rope_parameters": YARN}),
    "Qwen 2 with windows": ("Qwen2", {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 2}),
    "Qwen 3": ("Qwen3", {"tie_word_embeddings": True}),
    "Mistral": ("Mistral", {"sliding_window": None}),
    "Mistral with windows": ("Mistral", {"sliding_window": WINDOW}),
    "OLMo 2": ("Olmo2", {}),
    "OLMo 3": (
        "Olmo3",
        {
            "sliding_window": WINDOW,
            "rope_parameters": {"full_attention": YARN, "sliding_attention": {**PLAIN, "rope_theta": 500.0}},
        },
    ),
}
OWN_HEAD_SIZE = ("Qwen 3", "Mistral")
LLAMAS = {"Llama": False, "Llama tied": True}
"""whether the embedding is the head"""


def make_language_model(directory: str, name: str, head: int = 8) -> None:
    """Saves one of the Llamas or of the families.

    Args:
        head: channels of a head; see :func:`make_model`.
    """
    if name in LLAMAS:
        jobs.make_model(directory, LLAMAS[name], heads=64 // head, groups=32 // head)
    else:
        make_model(directory, name, head=head)


def make_model(directory: str, name: str, seed: int = 0, head: int = 8) -> None:
    """Saves the model; a vocabulary that needs padding, grouped queries, norms and biases that can be told apart.

    Args:
        head: channels of a head; families whose head size is their own get twice as many.
    """
    import transformers

    family, own = FAMILIES[name]
    settings = dict(
        hidden_size=8 * head, intermediate_size=96, num_hidden_layers=4, vocab_size=509, num_attention_heads=8,
        num_key_value_heads=4, max_position_embeddings=256, rope_parameters=dict(PLAIN), initializer_range=0.1, pad_token_id=None,
        bos_token_id=None, eos_token_id=None,
    ) | own  # fmt: skip
    if name in OWN_HEAD_SIZE:
        settings["head_dim"] = 2 * head
    config = getattr(transformers, f"{family}Config")(**settings)
    torch.manual_seed(seed)
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # transformers starts norms at 1 and biases at 0
                parameter += 0.2 * torch.randn_like(parameter)
    model.save_pretrained(directory)


def exported(directory: str, layout: dict[str, Any], out: str) -> None:
    """Loads the model under a layout and writes it again."""
    with jobs.session(directory, layout) as made:
        made.export(Path(out), torch.float32, {})


def saved(directory: str, layout: dict[str, Any], checkpoints: str) -> None:
    """Loads the model under a layout and writes a checkpoint."""
    with jobs.session(directory, layout) as made:
        made.engine.prepare_training(OptimSettings(), 1)
        save(made.engine, Path(checkpoints), 1, {}, keep=1)
        made.engine.settle()


def restored(directory: str, layout: dict[str, Any], checkpoints: str, out: str) -> None:
    """Loads a model under a layout, puts a checkpoint in its place and writes that."""
    with jobs.session(directory, layout) as made:
        made.engine.prepare_training(OptimSettings(), 1)
        (found,) = checkpoint.find(Path(checkpoints))
        checkpoint.restore({"model": made.engine}, found)
        made.export(Path(out), torch.float32, {})


def unloaded(directory: str) -> list[str]:
    """Tensors that transformers misses or has no place for."""
    from transformers import AutoModelForCausalLM

    _model, told = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    return sorted(str(name) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") for name in told[kind])


def greedy(directory: str, prompts: list[list[int]], tokens: int) -> list[list[int]]:
    """The most probable continuations, by transformers without a cache."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    made = []
    for prompt in prompts:
        ids = list(prompt)
        with torch.no_grad():
            for _ in range(tokens):
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        made.append(ids[len(prompt) :])
    return made
