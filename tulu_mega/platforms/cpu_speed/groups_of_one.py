"""Collectives of megatron-core's gradient buffers in which a single rank takes part.

gloo copies gradients and parameters, into fresh memory, where a single rank reduces and gathers them in place.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable

import torch.distributed as dist


def install() -> None:
    """Make megatron-core skip the collectives of a single rank, which change nothing."""
    buffers = importlib.import_module("megatron.core.distributed.param_and_grad_buffer")
    buffers.dist_reduce_scatter_func = unless_alone(buffers.dist_reduce_scatter_func)
    buffers.dist_all_gather_func = unless_alone(buffers.dist_all_gather_func)


def unless_alone(collective: Callable) -> Callable:
    """Wrap a collective so that it returns at once where a rank would only send its memory to itself."""

    def call(output, given, *args, group=None, async_op=False, **kwargs):
        in_place = output.data_ptr() == given.data_ptr() and output.numel() == given.numel()
        if in_place and not async_op and dist.get_world_size(group) == 1:
            return None
        return collective(output, given, *args, group=group, async_op=async_op, **kwargs)

    return call
