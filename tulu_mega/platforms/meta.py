"""A platform without a device: megatron-core builds models, gradient buffers and optimizers of any size, which take no memory.

Use it in a process of its own: the process cannot compute anything afterwards.
"""

from __future__ import annotations

import torch

from tulu_mega.platforms import Platform, adam, cpu, offload, weight_gradient

_META = torch.device("meta")


def install() -> Platform:
    """Make torch's meta device the one that megatron-core takes for the current CUDA device. The back end of collectives is
    torch's fake one.

    Raises:
        RuntimeError: where CUDA is available.
    """
    cpu.install()
    torch.cuda.current_device = lambda: _META
    plain_type = torch.Tensor.type

    def cuda_type(self, *args, **kwargs):  # torch.cuda.meta.FloatTensor otherwise, which the optimizers do not know
        told = plain_type(self, *args, **kwargs)
        return told.replace(".meta.", ".") if isinstance(told, str) else told

    torch.Tensor.type = cuda_type
    adam.install()
    offload.install()
    weight_gradient.install()
    return Platform(_META, "fake")
