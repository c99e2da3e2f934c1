"""What only makes CPUs faster, each part with the time that it was measured to save. No part serves a GPU.

``TULU_MEGA_PLAIN=1`` in the environment turns all of it off, and the two parts of :mod:`tulu_mega.process` as well: layers are
megatron-core's own then, products and norms torch's. Results are the same but for the rounding of products and norms, which are
computed in another order. tests/platforms/test_plain.py holds them beside each other.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tulu_mega.process import plain


def serves(tensor: Tensor) -> bool:
    """Whether this package computes with a tensor: one of float32 on a CPU, unless it is turned off."""
    return tensor.dtype == torch.float32 and tensor.device.type == "cpu" and not plain()


def install() -> None:
    """Sets what concerns the whole process. `platforms.install` calls it on a CPU."""
    from tulu_mega.platforms.cpu_speed import groups_of_one, matmul

    if not plain():
        matmul.bound_caches()
        groups_of_one.install()
