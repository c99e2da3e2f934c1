"""Transformer Engine on a CPU: its own Python files, `compiled` in the place of its compiled half, and torch as a machine with
Hopper would have it, as far as it asks. For a process of its own, before megatron-core is imported."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import importlib.machinery
import importlib.util
import os
import sys
import types
from pathlib import Path

DIRECTORY = Path(sys.prefix) / "te"
"""where `make venv` installs requirements/te.txt: megatron-core must not find it in other processes, which cannot import it"""


def install() -> None:
    """Makes it what ``import transformer_engine`` gives.

    Raises:
        ImportError: where its files are not installed.
    """
    sys.path.insert(0, str(DIRECTORY))
    os.environ["NVTE_PROJECT_BUILDING"] = "1"  # looks for no CUDA libraries
    os.environ["NVTE_TORCH_COMPILE"] = "0"
    for name in ("onnx", "onnxscript"):  # for export alone
        sys.modules[name] = _Anything(name)
    spec = importlib.util.find_spec("transformer_engine")
    if spec is None:
        raise ImportError(f"no transformer_engine in {DIRECTORY}; make venv installs it there")
    package = importlib.util.module_from_spec(spec)
    sys.modules["transformer_engine"] = package
    sys.modules["transformer_engine_torch"] = importlib.import_module("tests.standins.transformer_engine.compiled")
    common = importlib.import_module("transformer_engine.common")
    common.load_framework_extension = lambda framework: None
    spec.loader.exec_module(package)


class _Anything(types.ModuleType):
    """A module of whose names everything can be called and named further."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__spec__ = importlib.machinery.ModuleSpec(name, None)

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything(name)

    def __call__(self, *_args, **_options):
        return self


def pretend() -> None:
    """Makes it believe in a Hopper GPU, and puts on the CPU what it puts there. Call after `platforms.cpu.install`."""
    import torch

    pretended = _Torch(torch)
    for name, module in list(sys.modules.items()):
        if name.startswith("transformer_engine.") and getattr(module, "torch", None) is torch:
            module.torch = pretended
    torch.Tensor.to = _on_cpu(torch.Tensor.to)
    torch.Tensor.is_cuda = property(lambda self: sys._getframe(1).f_globals["__name__"].startswith("transformer_engine"))
    _hopper(torch)
    _without_coalescing(torch)
    torch.cuda.Stream = torch.cuda.Event = _Stream
    torch.cuda.current_stream = torch.cuda.default_stream = lambda device=None: _Stream()
    ring = importlib.import_module("transformer_engine.pytorch.attention.dot_product_attention.context_parallel")
    communicate = ring.flash_attn_p2p_communicate
    ring.flash_attn_p2p_communicate = lambda *args: [_WaitedOnce(work) for work in communicate(*args)]


def without_values() -> None:
    """Lets tensors without values go on a device that is not there (`tests/standins/cuda_device`): values become shapes.

    Call once that device is pretended."""
    import torch

    compiled = sys.modules["transformer_engine_torch"]

    def attended(longest_q, longest_k, *rest):
        query = rest[11]
        return [query.clone(), query.new_empty(*query.shape[:2], 1, dtype=torch.float32), query.new_empty(2, dtype=torch.int64)]

    def gradients(*arguments):
        return [*(each.clone() for each in arguments[13:16]), None, None]

    def half(tensor, cu_seqlens, index):
        at = tensor.dim() - 3
        return tensor.narrow(at, 0, tensor.shape[at] // 2).clone()

    def half_lse(lse, cu_seqlens, packed, columns):
        return lse.narrow(1, 0, columns).clone()

    compiled.fused_attn_fwd, compiled.fused_attn_bwd = attended, gradients
    compiled.thd_read_half_tensor, compiled.thd_read_second_half_lse = half, half_lse
    for name in ("thd_second_half_lse_correction", "thd_out_correction", "thd_grad_correction"):
        setattr(compiled, name, lambda *_args: None)
    choice = importlib.import_module("transformer_engine.pytorch.attention.dot_product_attention.utils")
    plain = choice.get_attention_backend
    # FusedAttention refuses tensors of a class it does not know
    choice.get_attention_backend = lambda asked: plain(dataclasses.replace(asked, qkv_type=torch.Tensor))
    _hopper(torch)


def _hopper(torch) -> None:
    """What Transformer Engine asks of a GPU."""
    torch.cuda.get_device_capability = lambda device=None: (9, 0)
    torch.cuda.get_device_properties = lambda device=None: types.SimpleNamespace(
        major=9, minor=0, multi_processor_count=132, name="NVIDIA H100", total_memory=80 << 30
    )
    torch.cuda.is_current_stream_capturing = lambda: False
    torch.version.cuda = "12.9"
    importlib.import_module("transformer_engine.pytorch.distributed")._lazy_init = lambda: None


def _without_coalescing(torch) -> None:
    """Gloo refuses to coalesce some collectives, and makes one type of others' tensors."""
    buffers = importlib.import_module("megatron.core.distributed.param_and_grad_buffer")
    torch.distributed._coalescing_manager = buffers._coalescing_manager = _one_by_one
    for name in ("dist_reduce_scatter_func", "dist_all_gather_func"):
        setattr(buffers, name, _waited_for(getattr(buffers, name)))


class _Stream:
    """Of CUDA, or an event of one: all is done when it is asked for."""

    def __init__(self, *_args, **_options): ...

    def __getattr__(self, name: str):
        if name in ("record", "record_event", "synchronize", "wait", "wait_event", "wait_stream"):
            return lambda *_args: None
        raise AttributeError(name)


@contextlib.contextmanager
def _one_by_one(*_args, **_options):
    """In the place of torch's: what is asked for in it is done at once."""
    yield _Stream()


def _waited_for(collective):
    """Done when it returns: in `_one_by_one` nobody would wait for it."""

    def call(*args, async_op=False, **options):
        return collective(*args, **options)

    return call


class _WaitedOnce:
    """A message that may be waited for again, as NCCL's may and gloo's may not."""

    def __init__(self, work) -> None:
        self._work = work

    def wait(self) -> None:
        work, self._work = self._work, None
        if work is not None:
            work.wait()


class _Torch(types.ModuleType):
    """torch as one of Transformer Engine's modules sees it: CUDA is available, and what is made on it is made on the CPU."""

    def __init__(self, torch) -> None:
        super().__init__("torch")
        self._torch = torch
        self.cuda = types.ModuleType("torch.cuda")
        self.cuda.is_available = lambda: True
        self.cuda.__getattr__ = lambda name: getattr(torch.cuda, name)
        for name in ("arange", "empty", "empty_like", "full", "ones", "tensor", "zeros", "zeros_like"):
            setattr(self, name, _on_cpu(getattr(torch, name)))

    def __getattr__(self, name: str):
        return getattr(self._torch, name)


def _on_cpu(function):
    @functools.wraps(function)
    def call(*args, **options):
        if _is_cuda(options.get("device")):
            options["device"] = "cpu"
        return function(*("cpu" if _is_cuda(each) else each for each in args), **options)

    return call


def _is_cuda(device) -> bool:
    return getattr(device, "type", device) == "cuda"
