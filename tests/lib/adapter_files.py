"""Directories of low-rank adapters with random numbers, as PEFT writes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from tulu_mega.bridge.adapters import adapter_family
from tulu_mega.bridge.families import family_for
from tulu_mega.bridge.files.peft import adapter_config, write_adapters
from tulu_mega.config.lora import LoraSettings


def make(directory: Path, model: Path, rank: int = 3, seed: int = 0, **told: Any) -> Path:
    """Adapters beside all matrices of a model's layers, with both factors drawn.

    Args:
        told: fields of adapter_config.json that say something else.
    """
    config = json.loads((model / "config.json").read_text())
    lora = LoraSettings(rank=rank, alpha=2.0 * rank)
    shapes = adapter_family(family_for(config), lora, config).hf_shapes(config)
    draw = torch.Generator().manual_seed(seed)
    tensors = {name: 0.2 * torch.randn(*shape, generator=draw) for name, shape in shapes.items()}
    write_adapters(directory, tensors, adapter_config(str(model), lora, False) | told)
    return directory
