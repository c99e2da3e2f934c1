"""Adds the gradient of a linear layer's weight to a buffer of higher precision, without a temporary of the weight's size."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable

import torch
from torch import Tensor

_log = logging.getLogger(__name__)


def add_product(into_MK: Tensor, upstream_NM: Tensor, input_NK: Tensor) -> None:
    """``into += upstream.t() @ input``, added up in float32 where the buffer is float32.

    On CUDA cuBLAS reads bf16 and adds to float32 in one pass, where torch lets it: by torch's sources 2.8 and 2.9 give float32
    products of bf16 but refuse to add them to float32 (pull request 167931 of November 2025 allows it). The first call tries, and
    an older torch takes a temporary of the weight's size. A CPU has no such product: the factors are converted first.

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
        _way(into_MK.dtype, upstream_NM.dtype, into_MK.device)(into_MK, upstream_NM.t(), input_NK)
    else:
        _of_converted(into_MK, upstream_NM.t(), input_NK)


def _in_one_pass(into_MK: Tensor, left_MN: Tensor, right_NK: Tensor) -> None:
    torch.addmm(into_MK, left_MN, right_NK, out_dtype=into_MK.dtype, out=into_MK)


def _through_a_temporary(into_MK: Tensor, left_MN: Tensor, right_NK: Tensor) -> None:
    into_MK.add_(torch.mm(left_MN, right_NK, out_dtype=into_MK.dtype))


def _of_converted(into_MK: Tensor, left_MN: Tensor, right_NK: Tensor) -> None:
    into_MK.addmm_(left_MN.to(into_MK.dtype), right_NK.to(into_MK.dtype))


@functools.cache
def _way(into: torch.dtype, factors: torch.dtype, device: torch.device) -> Callable[[Tensor, Tensor, Tensor], None]:
    """The best way that this torch does not refuse, tried once on a small product; waits for nothing."""
    small, buffer = torch.zeros(16, 16, dtype=factors, device=device), torch.zeros(16, 16, dtype=into, device=device)
    for way in (_in_one_pass, _through_a_temporary):
        try:
            way(buffer, small, small)
        except (RuntimeError, TypeError) as error:  # TypeError: a torch before 2.8 knows no out_dtype
            refused = str(error).splitlines()[0]
        else:
            break
    else:
        way = _of_converted
    if way is not _in_one_pass:
        _log.warning("weight gradients in %s of %s products: %s, for torch %s refused: %s", into, factors,
                     way.__name__.strip("_").replace("_", " "), torch.__version__, refused)  # fmt: skip
    return way
