"""What metrics.jsonl says of low-rank adapters."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist

from tulu_mega.bridge.adapters import adapter_family
from tulu_mega.bridge.families import family_for
from tulu_mega.train.engine import Engine


@torch.no_grad()
def adapter_figures(engine: Engine) -> dict[str, float]:
    """Return the adapters' norm and the share of the weights that trains; nothing of a model without adapters.

    Every rank calls it. The norm is of all A and B together, a reward model's head among them, each number counted once: the same
    under every layout.
    """
    if engine.lora is None:
        return {}
    engine.settle()
    place = engine.topology
    total = torch.zeros(1, dtype=torch.float64, device=engine.platform.device)
    for chunk in engine.chunks:
        for parameter in chunk.parameters():
            if parameter.requires_grad and (place.tensor_rank == 0 or getattr(parameter, "tensor_model_parallel", False)):
                total += parameter.double().pow(2).sum()
    for group, size in ((place.tensor_group, place.tensor), (place.pipeline_group, place.pipeline)):
        if size > 1:
            dist.all_reduce(total, group=group)
    trained, frozen = counts(engine)
    return {"adapter_norm": math.sqrt(float(total)), "trained_share": trained / (trained + frozen)}


def counts(engine: Engine) -> tuple[int, int]:
    """Return how many numbers of a model with adapters train, and how many do not."""
    lora, config = engine.lora, engine.hf.to_dict()
    model = family_for(config)
    thin = adapter_family(model, lora, config).hf_shapes(config)
    whole = sum(math.prod(shape) for shape in model.hf_shapes(config).values())
    trained = sum(map(math.prod, thin.values()))
    return trained, whole - (math.prod(model.hf_shapes(config)[model.head]) if model.reward else 0)
