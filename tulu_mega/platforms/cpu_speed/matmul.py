"""float32 matrix products on CPUs by oneDNN, which torch ships but keeps for lower precisions.

torch hands float32 products to MKL. On an AMD EPYC with AVX-512 (Zen 4) oneDNN takes 8 to 20% less time for the shapes of a
model's linear layers, with the same rounding error; only a product whose first factor is transposed, as in the gradient of a
weight, is MKL's. Without AVX-512 (Zen 3) MKL is the faster one, mostly by 10 to 25%, and has them all; so it has on Intel's own
processors, where a whole step takes 6% less with it.
"""

from __future__ import annotations

import contextlib
import os

import torch
from torch import Tensor

from tulu_mega.platforms.cpu_speed.served import serves

CACHES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
"""Environment variables that bound the caches of oneDNN and of torch's layer above it, which keep half a megabyte and more for
each shape; they are read at the first product. Packs are of all lengths: by default (1,024 each) a process grew by 10 MB/s."""
SHAPES = 64
"""Shapes to keep; the layers of a micro-batch share some ten."""


def bound_caches() -> None:
    """Bound oneDNN's caches unless the user has set them. It has no effect after this process's first product."""
    for name in CACHES:
        os.environ.setdefault(name, str(SHAPES))


def _of_amd() -> bool:
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as told:
        return any(line.startswith("vendor_id") and "AuthenticAMD" in line for line in told)
    return False


OPERATOR = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None
_ONEDNN = OPERATOR if torch.backends.cpu.get_cpu_capability() == "AVX512" and _of_amd() else None


def times_transposed(rows_NK: Tensor, weight_MK: Tensor, space: Tensor | None = None) -> Tensor:
    """``rows @ weight.t()``, outside autograd.

    Args:
        rows_NK: [..., K].
        weight_MK: [M, K], contiguous or the transpose of such a one.
        space: [N or more, M] whose first N rows MKL fills, for rows [N, K]. New memory costs a fault for every 4 KiB; oneDNN has
            no way around it.

    Returns:
        [..., M], contiguous.
    """
    if _ONEDNN is None or not serves(rows_NK) or not rows_NK.numel():
        return torch.matmul(rows_NK, weight_MK.t(), out=None if space is None else space[: len(rows_NK)])
    return _ONEDNN(rows_NK, weight_MK, None, "none", [], "")
