"""Adds the gradient of a linear layer's weight to a buffer of higher precision, without a temporary of the weight's size."""

from __future__ import annotations

import torch
from torch import Tensor


def add_product(into_MK: Tensor, upstream_NM: Tensor, input_NK: Tensor) -> None:
    """``into += upstream.t() @ input``, added up in float32 where the buffer is float32.

    On CUDA cuBLAS reads bf16 and adds to float32 in one pass (torch 2.8 or newer). A CPU has no such product: the factors are
    converted first.

    Raises:
        ValueError: the buffer is neither of the factors' type nor of a higher precision.
    """
    if into_MK.dtype == upstream_NM.dtype:
        into_MK.addmm_(upstream_NM.t(), input_NK)
    elif into_MK.itemsize <= upstream_NM.itemsize:
        raise ValueError(
            f"a buffer of {into_MK.dtype} for factors of {upstream_NM.dtype}: expected the factors' type or one of higher "
            "precision; accumulate gradients in float32"
        )
    elif into_MK.is_cuda:
        torch.addmm(into_MK, upstream_NM.t(), input_NK, out_dtype=into_MK.dtype, out=into_MK)
    else:
        into_MK.addmm_(upstream_NM.t().to(into_MK.dtype), input_NK.to(into_MK.dtype))
