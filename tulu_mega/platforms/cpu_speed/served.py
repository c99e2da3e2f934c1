"""The tensors that this package computes with."""

from __future__ import annotations

import torch
from torch import Tensor

from tulu_mega.process import plain


def serves(tensor: Tensor) -> bool:
    """Whether this package computes with a tensor: one of float32 on a CPU, unless it is turned off."""
    return tensor.dtype == torch.float32 and tensor.device.type == "cpu" and not plain()
