"""NF4: four bits a weight, in the format of bitsandbytes (QLoRA, Dettmers et al., arXiv 2305.14314).

Every 64 neighbours in a row share a scale, the largest of their magnitudes, and each is the nearest of 16 levels times that. Two
weights lie in a byte, the first in its upper half. With double quantization the scales of a whole matrix, less their mean, are
bytes themselves: each the nearest of 256 levels times the largest magnitude of 256 neighbours. A weight takes 4.5 bits, or 4.13.

bitsandbytes counts blocks through the whole flattened matrix. Where rows are whole blocks, which is asked for here, these are the
same blocks, and a part of a matrix can be read without the others.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from tulu_mega.config.lora import NF4_BLOCK, NF4_GROUP

BLOCK, GROUP = NF4_BLOCK, NF4_GROUP
_LEVELS = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334),
    *(-0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
"""Quantiles of a normal distribution, zero among them (appendix E of the paper)."""
_SLAB = 2**22
"""Weights that are looked at together."""
_SMALLEST = 1e-38


@functools.cache
def levels(device: torch.device) -> Tensor:
    """The 16 levels, ascending."""
    return torch.tensor(_LEVELS, device=device)


@functools.cache
def pairs(device: torch.device) -> Tensor:
    """[256, 2]: the levels of the two weights in a byte."""
    of = levels(device)
    return torch.stack([of.repeat_interleave(16), of.repeat(16)], dim=1)


@functools.cache
def scale_levels(device: torch.device) -> Tensor:
    """The 256 levels of scales, ascending: dynamic exponents (Dettmers et al., arXiv 2110.02861). Seven decades down from 1, each
    with twice as many levels as the one below, evenly between a tenth and the whole of it; both signs, 0 and 1."""
    made = [torch.zeros(1), torch.ones(1)]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2**exponent + 1)
        decade = 10 ** (exponent - 6) * ((edges[:-1] + edges[1:]) / 2)
        made += [decade, -decade]
    return torch.cat(made).sort().values.to(device)


def quantize(rows: Tensor, numbers: Tensor, scales: Tensor) -> None:
    """Write a matrix's blocks.

    Args:
        rows: [R, C], C a multiple of 64.
        numbers: uint8 [R, C / 2].
        scales: float32 [R, C / 64].
    """
    of = levels(rows.device)
    middles = (of[:-1] + of[1:]) / 2
    step = max(1, _SLAB // rows.shape[1])
    for at in range(0, len(rows), step):
        blocks = rows[at : at + step].float().unflatten(1, (-1, BLOCK))
        largest = blocks.abs().amax(-1)
        scaled = (blocks * (1.0 / largest.clamp(min=_SMALLEST)).unsqueeze(-1)).clamp_(-1, 1)
        nearest = torch.bucketize(scaled, middles, out_int32=True).to(torch.uint8).flatten(1)
        numbers[at : at + step] = nearest[:, ::2] << 4 | nearest[:, 1::2]
        scales[at : at + step] = largest


def dequantize(numbers: Tensor, scales: Tensor, out: Tensor) -> None:
    """Write the weights that blocks stand for.

    Args:
        numbers, scales: of `quantize`.
        out: [R, C].
    """
    table = pairs(numbers.device)
    step = max(1, _SLAB // out.shape[1])
    for at in range(0, len(numbers), step):
        part = numbers[at : at + step]
        values = table.index_select(0, part.flatten().int()).view(len(part), -1, BLOCK)
        out[at : at + step] = (values * scales[at : at + step].unsqueeze(-1)).flatten(1)


def quantize_scales(scales: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize the scales of a whole matrix once more.

    Args:
        scales: float32, in the order of the flattened matrix.

    Returns:
        bytes, the float32 scale of each 256 of them, and the mean that was taken off.
    """
    offset, of = scales.mean(), scale_levels(scales.device)
    groups = torch.nn.functional.pad(scales - offset, (0, -len(scales) % GROUP)).view(-1, GROUP)
    largest = groups.abs().amax(1)
    scaled = groups * (1.0 / largest.clamp(min=_SMALLEST)).unsqueeze(1)
    nearest = torch.bucketize(scaled, (of[:-1] + of[1:]) / 2, out_int32=True).to(torch.uint8)
    return nearest.flatten()[: len(scales)], largest, offset


def dequantize_scales(numbers: Tensor, largest: Tensor, offset: Tensor) -> Tensor:
    """The scales that bytes stand for.

    Args:
        numbers: uint8.
        largest: float32, of each one's group of 256, in their shape.
        offset: of `quantize_scales`.
    """
    values = scale_levels(numbers.device).index_select(0, numbers.flatten().int()).view(numbers.shape)
    return values * largest + offset
