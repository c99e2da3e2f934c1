"""Parameters that are kept in FP8: tensors of Transformer Engine's that pass for bf16 and hold bytes and scales.

Reading a part of one gives bf16 numbers; writing into a part is what they do not have.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor


def in_fp8(parameter: Tensor) -> bool:
    """Nothing of Transformer Engine is imported for it."""
    return hasattr(parameter, "quantize_")


def values(parameter: Tensor) -> Tensor:
    """What the parameter stands for, an ordinary tensor of its type outside autograd; only of an FP8 one it is a copy."""
    return parameter.dequantize(dtype=parameter.dtype).detach() if in_fp8(parameter) else parameter.detach()


@contextlib.contextmanager
def unrounded(parameter: Tensor) -> Iterator[Tensor]:
    """What to write a parameter's values into, in any order; an FP8 one is cast from it at the end.

    An optimizer that is built later starts from the values as they were before the cast: Transformer Engine has a place for them,
    in main memory (``preserve_high_precision_init_val``), until then.
    """
    if not in_fp8(parameter):
        yield parameter
        return
    kept = parameter.get_high_precision_init_val() if hasattr(parameter, "get_high_precision_init_val") else None
    whole = torch.empty(parameter.shape, dtype=parameter.dtype, device=parameter.device) if kept is None else kept
    yield whole
    parameter.quantize_(whole.to(parameter.device))
