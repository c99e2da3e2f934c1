"""RMS norm (Zhang and Sennrich, arXiv 1910.07467) on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``x * weight / sqrt(mean(x^2) + eps)`` over the last dimension, as `torch.nn.functional.rms_norm`."""
    return _InFewPasses.apply(x, weight, eps)


class _InFewPasses(torch.autograd.Function):
    """The norm in few passes over memory; torch computes it by a chain of operations and keeps their results."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        inverse = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        return torch.mul(x, inverse).mul_(weight)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, inverse = ctx.saved_tensors
        both_TH = (grad * x).flatten(0, -2)
        along = both_TH.mv(weight).view(inverse.shape).mul_(inverse.pow(3)).div_(-x.shape[-1])
        grad_x = torch.mul(grad, weight).mul_(inverse).addcmul_(x, along)
        return grad_x, both_TH.t().mv(inverse.flatten()), None
