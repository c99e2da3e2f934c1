"""A stand-in for apex's extension `fused_weight_gradient_mlp_cuda`, on machines that have no apex.

megatron-core's linear layers add a weight's gradient to its buffer through that extension when `gradient_accumulation_fusion` is
set, and refuse the setting where they cannot import it. Two functions are all they call.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
import types

from torch import Tensor
from tulu_kernels.weight_gradient import add_product

_NAME = "fused_weight_gradient_mlp_cuda"


def wgrad_gemm_accum_fp32(input_TK: Tensor, upstream_TM: Tensor, main_grad_MK: Tensor) -> None:
    """``main_grad += upstream.t() @ input`` into a float32 buffer, whatever the factors are of; leading dimensions are rows."""
    add_product(main_grad_MK, upstream_TM.flatten(0, -2), input_TK.flatten(0, -2))


def wgrad_gemm_accum_fp16(input_TK: Tensor, upstream_TM: Tensor, main_grad_MK: Tensor) -> None:
    """The same into a 16-bit buffer, of the factors' type."""
    add_product(main_grad_MK, upstream_TM.flatten(0, -2), input_TK.flatten(0, -2))


def install() -> None:
    """Register the stand-in under the extension's name, unless the extension itself is installed."""
    if importlib.util.find_spec(_NAME) is not None:  # also this stand-in, the second time
        return
    module = types.ModuleType(_NAME, __doc__)
    module.__spec__ = importlib.machinery.ModuleSpec(_NAME, loader=None, origin=__file__)
    module.wgrad_gemm_accum_fp32 = wgrad_gemm_accum_fp32
    module.wgrad_gemm_accum_fp16 = wgrad_gemm_accum_fp16
    sys.modules[_NAME] = module  # what deferred weight gradients import, when they are computed
    layers = importlib.import_module("megatron.core.tensor_parallel.layers")  # may have looked for the extension before
    layers.fused_weight_gradient_mlp_cuda = module
    layers._grad_accum_fusion_available = True
