"""What a layer gives autograd to keep, by the module that gives it, in bytes of memory."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.lib import jobs, world
from tests.lib.layouts import size
from tulu_mega.config import OptimSettings
from tulu_mega.objectives.sft import SftObjective

LAYER = 1
"""the one that is watched: neither the first nor the last"""


def _memory(tensor: Tensor) -> int:
    """Where the memory that a tensor lies in begins."""
    return tensor.untyped_storage().data_ptr()


class Watched:
    """A layer whose forward pass is watched.

    Args:
        ours: memory that does not count: that of the weights.
    """

    def __init__(self, layer: torch.nn.Module, ours: set[int]):
        self.layer, self.ours, self.plain = layer, ours, layer.forward
        self.kept: list[tuple[str, int]] = []
        """module and bytes of each piece of memory, once, in the first pass"""
        self.passes = 0
        """how often the layer was computed"""
        self._inside = [""]
        self._given: list[tuple[str, Tensor]] = []
        for name, module in layer.named_modules():
            module.register_forward_pre_hook(lambda *_args, name=name: self._inside.append(name))
            module.register_forward_hook(lambda *_args: self._leave())
        layer.forward = self.forward

    def _leave(self) -> None:
        self._inside.pop()

    def _give(self, tensor: Tensor) -> Tensor:
        if type(tensor) in (Tensor, torch.nn.Parameter):  # of a quantized one its parts are given as well
            self._given.append((self._inside[-1], tensor))
        return tensor

    def forward(self, *args, **kwargs):
        """As the layer's. What it is handed is not its own unless a gradient goes to it."""
        self.passes += 1
        handed = {_memory(each) for each in kwargs.values() if isinstance(each, Tensor) and not each.requires_grad}
        with torch.autograd.graph.saved_tensors_hooks(self._give, lambda tensor: tensor):
            result = self.plain(*args, **kwargs)
        found: dict[int, tuple[str, int]] = {}
        for module, tensor in self._given:
            place, size = _memory(tensor), tensor.untyped_storage().nbytes()
            if tensor.dtype not in (torch.int32, torch.int64) and size and place not in self.ours | handed:
                found.setdefault(place, (module, size))
        if self.passes == 1:
            self.kept = list(found.values())
        self._given = []
        return result


def of_a_layer(directory: str, layout: dict[str, Any], dtype: str, cases: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Of each case, by rank, a step's loss and gradients, and what a layer kept for it.

    Args:
        cases: arguments of `jobs.session`.
    """
    ranks = size(layout)
    if ranks == 1:  # of several ranks the groups cannot be made anew in one process
        (alone,) = world.run(1, _all_of, directory, layout, dtype, cases)
        return [[each] for each in alone]
    return [world.run(ranks, _of_a_layer, directory, layout, dtype, case) for case in cases]


def _all_of(directory: str, layout: dict[str, Any], dtype: str, cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [_of_a_layer(directory, layout, dtype, case) for case in cases]


def _of_a_layer(directory: str, layout: dict[str, Any], dtype: str, case: dict[str, Any]) -> dict[str, Any]:
    with jobs.session(directory, layout, dtype, **case) as made:
        engine = made.engine
        (batch,) = jobs.share(made, jobs.sequences(engine.hf.vocab_size), 1)
        engine.prepare_training(OptimSettings(name="sgd", lr=0.0), 1)
        chunk = engine.chunks[0]
        watched = Watched(chunk.decoder.layers[LAYER], {_memory(each) for each in chunk.parameters()})
        loss = engine.forward_backward([batch], SftObjective("sum"))
        gradients = {name: each.main_grad.float().numpy().copy() for name, each in chunk.named_parameters()}
        return {"loss": loss.loss, "tokens": len(batch.tokens_T), "kept": watched.kept, "gradients": gradients}


NORMS = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
}
"""as they are called within a layer where they are apart, and where they are not"""


def gradients(case: dict[str, Any]) -> dict[str, np.ndarray]:
    """By names that do not depend on whether norms are apart."""
    found = {}
    for name, value in case["gradients"].items():
        for apart, within in NORMS.items():
            name = name.replace(apart, within)
        found[name] = value
    return found
