"""The model as Hugging Face's transformers builds it, without memory."""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PretrainedConfig


def hf_shapes(hf: PretrainedConfig, reward: bool) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every parameter; tied ones once."""
    kind = AutoModelForSequenceClassification if reward else AutoModelForCausalLM
    with torch.device("meta"):
        model = kind.from_config(hf)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
