"""The activation of gated feed-forwards in the local spec."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


class Swiglu(torch.nn.Module):
    """SwiGLU (Shazeer, arXiv 2002.05202) in few passes over memory, for megatron-core's slot for Transformer Engine's.

    Args:
        config: taken because megatron-core hands it over.
    """

    def __init__(self, config=None):
        super().__init__()

    def forward(self, gate_and_up: Tensor) -> Tensor:
        """
        Args:
            gate_and_up: [..., 2 * ffn].

        Returns:
            ``silu(gate) * up``, [..., ffn].
        """
        return _Swiglu.apply(gate_and_up)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """Return nothing: there are no parameters, but megatron-core's MLP calls this on all its modules."""
        return {}


class _Swiglu(torch.autograd.Function):
    """Keeps nothing but its input for backward."""

    @staticmethod
    def forward(ctx, gate_and_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_and_up)
        gate, up = gate_and_up.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        (gate_and_up,) = ctx.saved_tensors
        gate, up = gate_and_up.chunk(2, dim=-1)
        both = torch.empty_like(gate_and_up)
        grad_gate, grad_up = both.chunk(2, dim=-1)
        torch.mul(F.silu(gate), grad, out=grad_up)
        torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=grad_gate)
        return both
