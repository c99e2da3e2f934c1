"""Block-scaled E4M3 in torch.

The arithmetic is that of DeepGEMM's ``per_block_cast_to_fp8``, which vLLM quantizes with when it loads bf16 weights: scale =
max(|block|, 1e-4) / 448 in float32, number = round(weight * (1 / scale)), to nearest even. A NaN makes all of its block NaN,
numbers and scale; an infinite weight makes the scale infinite and becomes a NaN, beside zeros.

On every device the scale is the quotient, rounded once. Written as DeepGEMM has it, divided by a number of the host, torch makes
it a product with the rounded 1/448 on CUDA, whose last bit is another for about half of all scales; so vLLM's may differ there.
Servers are sent scales and make none.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tulu_kernels.fp8_blocks.plan import BLOCK

LARGEST = 448.0
"""of E4M3 (float8_e4m3fn)"""
LEAST = 1e-4
"""what a block's largest magnitude is raised to, so that a block of zeros has a scale"""


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """
    Args:
        weight: [rows, columns], bf16 or float32; blocks at the lower and right edges may be cut off.

    Returns:
        float8_e4m3fn [rows, columns], and float32 scales [ceil(rows / 128), ceil(columns / 128)].
    """
    rows, columns = weight.shape
    down, across = -(-rows // BLOCK), -(-columns // BLOCK)
    padded = torch.zeros(down * BLOCK, across * BLOCK, dtype=torch.float32, device=weight.device)
    padded[:rows, :columns] = weight
    blocks = padded.view(down, BLOCK, across, BLOCK)
    largest = blocks.abs().amax(dim=(1, 3), keepdim=True).clamp(min=LEAST)
    scales = largest / largest.new_full((), LARGEST)  # on the weight's device, see above
    numbers = (blocks * scales.reciprocal()).to(torch.float8_e4m3fn)
    return numbers.view(padded.shape)[:rows, :columns].contiguous(), scales.view(down, across)


def dequantize(numbers: Tensor, scales: Tensor) -> Tensor:
    """float32 [rows, columns] of what `quantize` gave."""
    rows, columns = numbers.shape
    spread = scales.repeat_interleave(BLOCK, 0)[:rows].repeat_interleave(BLOCK, 1)[:, :columns]
    return numbers.float() * spread
