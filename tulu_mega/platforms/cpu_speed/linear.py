"""megatron-core's tensor-parallel linear layers, with the CPU's float32 products by the faster library."""

from __future__ import annotations

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region, gather_from_sequence_parallel_region
from torch import Tensor

from tulu_mega.platforms.cpu_speed.matmul import times_transposed
from tulu_mega.platforms.cpu_speed.served import serves
from tulu_mega.process import plain


class _Product(torch.autograd.Function):
    """``x @ weight.t()``, whose backward adds the weight's gradient straight into megatron-core's gradient buffer."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return times_transposed(x, weight)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor]:
        x, weight = ctx.saved_tensors
        grad_x = times_transposed(grad, weight.t()) if ctx.needs_input_grad[0] else None
        upstream_TM, x_TK = grad.flatten(0, -2), x.flatten(0, -2)
        if not hasattr(weight, "grad_added_to_main_grad") or getattr(weight, "zero_out_wgrad", False):  # no DDP around the model
            return grad_x, upstream_TM.t().matmul(x_TK)
        weight.main_grad.addmm_(upstream_TM.t(), x_TK)
        weight.grad_added_to_main_grad = True
        return grad_x, torch.empty_like(weight)  # never read: DDP's hook waits for some gradient


class _ByProduct:
    """A mix-in for megatron-core's linear layers that replaces their matrix product."""

    def _forward_impl(self, input: Tensor, weight: Tensor, bias: Tensor | None, **options) -> Tensor:
        if not serves(weight) or not weight.requires_grad:
            return super()._forward_impl(input=input, weight=weight, bias=bias, **options)
        if options["sequence_parallel"]:  # backward: reduce-scatter of the ranks' partial gradients
            input = gather_from_sequence_parallel_region(input, tensor_parallel_output_grad=True, group=options["tp_group"])
        elif options["allreduce_dgrad"]:  # backward: all-reduce of them
            input = copy_to_tensor_model_parallel_region(input, group=options["tp_group"])
        product = _Product.apply(input, weight)
        return product if bias is None else product + bias


class ColumnLinear(_ByProduct, ColumnParallelLinear):
    """Rows of the weight are cut over tensor ranks."""


class RowLinear(_ByProduct, RowParallelLinear):
    """Columns of the weight are cut over tensor ranks."""


def linear_layers() -> tuple[type[ColumnParallelLinear], type[RowParallelLinear]]:
    """The classes of column-parallel and of row-parallel layers: megatron-core's own on GPUs and under TULU_MEGA_PLAIN=1."""
    if plain() or torch.cuda.is_available():
        return ColumnParallelLinear, RowParallelLinear
    return ColumnLinear, RowLinear
