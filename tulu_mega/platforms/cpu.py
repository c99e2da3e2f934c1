"""Lets megatron-core 0.16 run where torch has no CUDA. Never active where CUDA is used.

megatron-core asks torch for "the current CUDA device", its streams and its random state, and writes ``device="cuda"`` in
places. Each patch below names what it compensates.
"""

from __future__ import annotations

import contextlib
import importlib
import types

import torch

from tulu_mega.platforms.cpu_speed import whole_process
from tulu_mega.platforms.imports import prepare_imports

_CPU = torch.device("cpu")

_LITERAL_CUDA = (
    "megatron.core.pipeline_parallel.schedules",  # total_num_tokens = torch.zeros([], device="cuda")
    "megatron.core.optimizer.optimizer",  # loss scale and overflow buffers
    "megatron.core.optimizer.clip_grads",  # norms and their all-reduce
)
_FACTORIES = ("zeros", "ones", "empty", "full", "tensor")

_installed = False


class _CpuTorch(types.ModuleType):
    """torch as one of megatron-core's modules sees it: its factories make tensors on the CPU where "cuda" is asked for."""

    def __init__(self) -> None:
        super().__init__("torch")
        for name in _FACTORIES:
            setattr(self, name, self._redirected(getattr(torch, name)))

    @staticmethod
    def _redirected(factory):
        def make(*args, device=None, **kwargs):
            if device is not None and torch.device(device).type == "cuda":
                device = _CPU
            return factory(*args, device=device, **kwargs)

        return make

    def __getattr__(self, name):
        return getattr(torch, name)


class _Generators:
    """torch.cuda.default_generators: every device's generator is the CPU's."""

    def __getitem__(self, _index):
        return torch.default_generator


def install() -> None:
    """Applies every patch, once.

    Raises:
        RuntimeError: where CUDA is available; these patches would break it.
    """
    global _installed
    if _installed:
        return
    if torch.cuda.is_available():
        raise RuntimeError("the CPU platform must not be installed where CUDA is available")
    _installed = True
    prepare_imports()
    _patch_torch_cuda()
    _patch_tensors()
    for name in _LITERAL_CUDA:
        importlib.import_module(name).torch = _CpuTorch()
    whole_process.install()


def _patch_torch_cuda() -> None:
    cuda = torch.cuda
    # parameters, buffers and pipeline receives are allocated on torch.cuda.current_device(), also in autograd's threads
    cuda.current_device = lambda: _CPU
    # pipeline sends, timers and checkpoint writing wait for the device
    cuda.synchronize = lambda *args, **kwargs: None
    # DDP and checkpoint staging name streams even where nothing overlaps
    cuda.stream = lambda stream: contextlib.nullcontext()
    cuda.current_stream = cuda.default_stream = lambda *args, **kwargs: None
    # megatron's RNG tracker (dropout, recompute) reads and writes the device's random state
    cuda.get_rng_state = cuda.random.get_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    cuda.set_rng_state = cuda.random.set_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    cuda.manual_seed = torch.default_generator.manual_seed
    cuda.manual_seed_all = lambda seed: None
    cuda.default_generators = _Generators()
    # tensor_parallel.random sets the state through this hook, bound by name at import
    importlib.import_module("megatron.core.tensor_parallel.random")._lazy_call = lambda call, **kwargs: call()


def _patch_tensors() -> None:
    # checkpoint loading, optimizer state and tied embeddings move tensors with .cuda()
    torch.Tensor.cuda = lambda self, *args, **kwargs: self
    torch.nn.Module.cuda = lambda self, *args, **kwargs: self
    plain_type = torch.Tensor.type

    def cuda_type(self, *args, **kwargs):
        # the optimizers sort parameters by the strings torch.cuda.FloatTensor and torch.cuda.BFloat16Tensor
        if args or kwargs:
            return plain_type(self, *args, **kwargs)
        name = plain_type(self)
        return name if name.startswith("torch.cuda.") else name.replace("torch.", "torch.cuda.", 1)

    torch.Tensor.type = cuda_type
