"""Models for servers in FP8 blocks, their weights rounded as blocks are, and what transformers computes with them."""

from __future__ import annotations

import shutil
from collections.abc import Sequence as Several
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.lib import world
from tulu_mega.platforms.fp8 import server_obstacles
from tulu_mega.records import IGNORE, Response

CAN_SERVE = pytest.mark.skipif(bool(server_obstacles()), reason="vLLM's FP8 products want a GPU or a CPU with AMX")

BLOCK = 128
LARGEST = 448.0
"""of E4M3"""


def make_model(directory: str, model_type: str) -> None:
    """Matrices that are whole blocks on each of two workers; weights large enough for answers that are not all alike."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(3)
    config = AutoConfig.for_model(
        model_type, vocab_size=512, hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=128, max_position_embeddings=256, initializer_range=0.06, tie_word_embeddings=False,
        pad_token_id=None,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).bfloat16().save_pretrained(directory)


def round_matrices(directory: str, rounded: str) -> None:
    """The same model, in float32, with the layers' matrices as blocks have them: E4M3 numbers times a scale for 128 x 128."""
    shutil.copytree(directory, rounded)
    (file,) = Path(rounded).glob("*.safetensors")
    tensors = {name: tensor.float() for name, tensor in load_file(file).items()}
    for name, weight in tensors.items():
        if name.endswith("_proj.weight"):
            for rows in weight.split(BLOCK, 0):
                for block in rows.split(BLOCK, 1):
                    scale = block.abs().amax().clamp(min=1e-4) / LARGEST
                    block.copy_((block / scale).to(torch.float8_e4m3fn).float() * scale)
    save_file(tensors, file, metadata={"format": "pt"})


def distance(responses: Several[Response], directory: str) -> float:
    """Mean absolute difference between a server's log-probabilities and a model's."""
    (wanted,) = world.run(1, transformers_logp, directory, responses)
    told = torch.tensor([logp for each in responses for logp in each.sampler_logp])
    return (told - torch.tensor(wanted)).abs().mean().item()


def transformers_logp(directory: str, responses: Several[Response]) -> list[float]:
    """Log-probabilities of all trained tokens, one response after another, in float32."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    found: list[float] = []
    with torch.no_grad():
        for each in responses:
            ids, trained = torch.tensor([each.token_ids]), torch.tensor(each.labels[1:]) != IGNORE
            logp = model(ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
            found += logp[trained].tolist()
    return found
