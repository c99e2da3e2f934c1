"""The norm of all gradients where neither Transformer Engine nor apex computes it.

megatron-core's own stand-in reads each gradient's norm separately, so that a GPU is waited for once for every parameter.
"""

from __future__ import annotations

import importlib

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm


def multi_tensor_l2norm(_chunk_size, _overflow: Tensor, tensor_lists: list[list[Tensor]], per_tensor: bool):
    """As apex's: the norm of all tensors of the only list in float32, [1] on their device, and None for the norms of each.

    Raises:
        NotImplementedError: `per_tensor`, which megatron-core does not ask for.
    """
    if per_tensor:
        raise NotImplementedError("norms of each tensor")
    [tensors] = tensor_lists
    if all(each.dtype == torch.float32 for each in tensors):
        return get_total_norm(tensors).view(1), None
    norms = [torch.linalg.vector_norm(each, dtype=torch.float32) for each in tensors]  # torch would round each to bf16
    return torch.linalg.vector_norm(torch.stack(norms)).view(1), None


def install() -> None:
    """Replace megatron-core's stand-in by this norm."""
    clipping = importlib.import_module("megatron.core.optimizer.clip_grads")
    if clipping.l2_norm_impl is importlib.import_module("megatron.core.utils").local_multi_tensor_l2_norm:
        clipping.l2_norm_impl = multi_tensor_l2norm
