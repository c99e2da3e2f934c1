"""The optimizer's kernels in `compiled`."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = [
    "multi_tensor_adam",
    "multi_tensor_compute_scale_and_scale_inv",
    "multi_tensor_l2norm",
    "multi_tensor_scale",
    "multi_tensor_sgd",
]


def multi_tensor_adam(
    chunk_size, noop_flag, tensor_lists, lr, beta1, beta2, epsilon, step, mode, bias_correction, weight_decay
) -> None:
    """Adam in float32 on [gradients, parameters, first, second moments] and perhaps float32 masters of the parameters.

    Args:
        mode: 1 for decoupled weight decay.
    """
    masters = tensor_lists[4] if len(tensor_lists) == 5 else [None] * len(tensor_lists[0])
    correct1, correct2 = (1 - beta1**step, 1 - beta2**step) if bias_correction else (1.0, 1.0)
    for grad, parameter, first, second, master in zip(*tensor_lists[:4], masters, strict=True):
        value, up = (parameter if master is None else master).float(), grad.float()
        if mode == 0:
            up = up + weight_decay * value
        m = beta1 * first.float() + (1 - beta1) * up
        v = beta2 * second.float() + (1 - beta2) * up * up
        update = (m / correct1) / ((v / correct2).sqrt() + epsilon)
        if mode == 1:
            update = update + weight_decay * value
        value = value - lr * update
        for held, new in ((parameter, value), (first, m), (second, v), (master, value)):
            if held is not None:
                held.copy_(new)


def multi_tensor_l2norm(chunk_size, noop_flag, tensor_lists, per_tensor=False) -> tuple[Tensor, Tensor]:
    norms = torch.stack([tensor.float().norm() for tensor in tensor_lists[0]])
    return norms.norm().view(1), norms if per_tensor else norms.new_empty(0)


def multi_tensor_scale(chunk_size, noop_flag, tensor_lists, scale) -> None:
    for source, target in zip(*tensor_lists, strict=True):
        target.copy_(source * scale)
        noop_flag.logical_or_(~torch.isfinite(target).all())


def multi_tensor_sgd(
    chunk_size, noop_flag, tensor_lists, weight_decay, momentum, dampening, lr, nesterov, first_run, wd_after_momentum, scale
) -> None:
    """Plain steps on [gradients, parameters, momentum] and perhaps lower precision copies of the parameters."""
    assert not momentum and not weight_decay
    copies = tensor_lists[3] if len(tensor_lists) == 4 else [None] * len(tensor_lists[0])
    for grad, parameter, copy in zip(*tensor_lists[:2], copies, strict=True):
        parameter -= lr * scale * grad.to(parameter.dtype)
        if copy is not None:
            copy.copy_(parameter)


def multi_tensor_compute_scale_and_scale_inv(
    chunk_size, noop_flag, tensor_lists, max_fp8, force_pow_2_scales=False, epsilon=0.0
) -> None:
    """Scales and their inverses of largest magnitudes: [amaxes, scales, inverses]."""
    from tests.standins.transformer_engine.quantized import scale_of

    for amax, scale, inverse in zip(*tensor_lists, strict=True):
        scale.copy_(scale_of(amax, max_fp8, epsilon, force_pow_2_scales))
        inverse.copy_(scale.reciprocal())
