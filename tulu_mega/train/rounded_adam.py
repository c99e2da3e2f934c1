"""AdamW that keeps its moments in bf16.

In float32 a moment is updated; to bf16 it is rounded up or down at random, with the odds at which its mean is the exact value
(stochastic rounding; for training Gupta et al., arXiv 1502.02551). To the nearest, a second moment would stand still: one step
moves it by (1 - beta2) of itself or of the squared gradient, 0.001, and neighbours in bf16 are 0.004 to 0.008 of it apart.

Which way an element is rounded depends on its place in the whole model, by a hash, and on the step, and on no rank or generator:
so layouts agree, copies of a parameter stay alike, and a run that goes on does as it would have done. From step to step the
threshold moves on by the golden ratio, which fills the range evenly: an element's errors take turns and do not pile up, as
independent ones would (to some 5% of a second moment: 0.2% a step, times the root of the 500 steps that it remembers).
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

_PIECE = 2**22
"""elements that are updated at a time: what a step takes in float32 is some of these"""
_MOMENTS = ("exp_avg", "exp_avg_sq")
_GOLDEN = 0x9E3779B9
"""2**32 times the golden ratio's fraction"""


@dataclass(frozen=True)
class Box:
    """Elements of a parameter that follow one another on this rank, and where they are in the whole model's tensor."""

    key: str
    """the tensor's name"""
    shape: tuple[int, ...]
    """Shape of the whole tensor."""
    corner: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def count(self) -> int:
        """Elements."""
        return math.prod(self.sizes)


class RoundedAdam(torch.optim.Optimizer):
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101) by torch's fused kernel, with ``step`` kept in the group.

    Args:
        param_groups: as another optimizer has them, with `lr`, `betas`, `eps` and `weight_decay`.
        places: of each parameter the boxes that its elements are, in their order.
    """

    def __init__(self, param_groups: Sequence[Mapping[str, Any]], places: Mapping[Tensor, Sequence[Box]]):
        super().__init__([{"params": []}], {})
        self.param_groups = list(param_groups)  # past torch's check: of float32 models these are views of parameters
        self.places = places
        for group in self.param_groups:
            for p in group["params"]:
                for name in _MOMENTS:
                    self.state[p][name] = torch.zeros_like(p, dtype=torch.bfloat16)

    @torch.no_grad()
    def step(self, closure=None):
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            done = int(group.get("step", 0))
            group["step"] = done + 1
            for p in group["params"]:
                if p.grad is not None and p.numel() > 0:
                    self._update(p, group, done)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """As every optimizer's, into the tensors that are there: torch's would make moments float32, as parameters are."""
        for group, given in zip(self.param_groups, state_dict["param_groups"], strict=True):
            group.update({name: value for name, value in given.items() if name != "params"})
            for p, number in zip(group["params"], given["params"], strict=True):
                for name in _MOMENTS:
                    self.state[p][name].copy_(state_dict["state"][number][name])

    def _update(self, p: Tensor, group: Mapping[str, Any], done: int) -> None:
        held = [p, p.grad, *(self.state[p][name] for name in _MOMENTS)]
        values, grads, first, second = (each.flatten() for each in held)  # views: shards lie in one run
        beta1, beta2 = group["betas"]
        at = 0
        for box in self.places[p]:
            for rows in _rows(box).split(max(1, _PIECE // box.sizes[-1])):
                here = slice(at, at + len(rows) * box.sizes[-1])
                moments = [first[here].float(), second[here].float()]
                step = torch.full((), float(done), device=p.device)
                adamw(
                    [values[here]], [grads[here]], moments[:1], moments[1:], [], [step],
                    fused=True, amsgrad=False, beta1=beta1, beta2=beta2, lr=group["lr"], weight_decay=group["weight_decay"],
                    eps=group["eps"], maximize=False,
                )  # fmt: skip
                bits = noise(box, rows, p.device).flatten()
                first[here] = rounded(moments[0], thresholds(bits << 16, done))
                second[here] = rounded(moments[1], thresholds(bits, done))
                at = here.stop


def rounded(values: Tensor, noise: Tensor) -> Tensor:
    """float32 to bf16: up in magnitude where the lower 16 bits and the noise carry over, else down.

    Args:
        noise: int32 of 0 to 65,535, as many.
    """
    return ((values.view(torch.int32) + noise) & -0x10000).view(torch.float32).bfloat16()


def thresholds(bits: Tensor, step: int) -> Tensor:
    """Numbers of 0 to 65,535 that begin anywhere and move on by the golden ratio of that range from step to step.

    Args:
        bits: int32, of which the upper half is where they begin.
        step: updates done.
    """
    moved = _GOLDEN * step % 2**32
    return ((bits + (moved if moved < 2**31 else moved - 2**32)) >> 16) & 0xFFFF


def noise(box: Box, rows: Tensor, device: torch.device) -> Tensor:
    """32 random bits for each element of some rows of a box, [rows, columns], int32, always the same.

    Args:
        rows: their numbers in the whole tensor, int64, on the host.
    """
    start = _mixed(torch.tensor([zlib.crc32(box.key.encode())]))
    of_rows = _mixed(_mixed((rows & 0xFFFFFFFF) ^ start) ^ (rows >> 32))
    columns = torch.arange(box.corner[-1], box.corner[-1] + box.sizes[-1], device=device, dtype=torch.int32)
    of_rows = torch.where(of_rows < 2**31, of_rows, of_rows - 2**32).to(torch.int32).to(device)
    x = of_rows[:, None] + columns * (_GOLDEN - 2**32)  # columns lie far apart
    # lowbias32, a hash of 32 bits by Wellons (2018), where the shift fills with zeros
    x = x ^ ((x >> 16) & 0xFFFF)
    x *= 0x7FEB352D
    x ^= (x >> 15) & 0x1FFFF
    x *= 0x846CA68B - 2**32
    x ^= (x >> 16) & 0xFFFF
    return x


def _rows(box: Box) -> Tensor:
    """Numbers of a box's rows, counted over all axes of the whole tensor but the last."""
    number = torch.zeros(1, dtype=torch.int64)
    for extent, corner, size in zip(box.shape[:-1], box.corner[:-1], box.sizes[:-1], strict=True):
        number = (number[:, None] * extent + corner + torch.arange(size)).flatten()
    return number


def _mixed(x: Tensor) -> Tensor:
    """lowbias32 of int64 numbers below 2**32, on the host."""
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
    x = ((x ^ (x >> 15)) * 0x846CA68B) & 0xFFFFFFFF
    return x ^ (x >> 16)
