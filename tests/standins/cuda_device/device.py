"""A CUDA device that is not there: tensors that say they are on it, have shapes, no values, and complain when they meet others.

Torch's fake tensors do that; this lets programs of megatron-core and ours run on them where torch was built without CUDA. For a
process of its own, which loads `guard` before it imports torch.
"""

from __future__ import annotations

import contextlib
import ctypes
import subprocess
import sys
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

_FILE = Path(__file__)

STAGED = 64
"""Bytes of which the driver makes a copy of its own, so that nobody waits for them although they are not pinned: really 64 KiB,
but the packs here are small."""


def build(directory: Path, compiler: str) -> Path:
    """`guard.cpp`, compiled against the torch that is installed."""
    torch = Path(find_spec("torch").origin).parent
    library = directory / "guard.so"
    source, headers, libraries = _FILE.with_name("guard.cpp"), torch / "include", torch / "lib"
    options = ["-std=c++20", "-O0", "-shared", "-fPIC", f"-I{headers}"]
    linked = [f"-L{libraries}", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{libraries}"]  # after the source: only what it needs is kept
    subprocess.run([compiler, *options, str(source), "-o", str(library), *linked], check=True)
    return library


def load(library: str) -> None:
    """Before torch is imported, which asks once what devices there are."""
    assert "torch" not in sys.modules
    ctypes.CDLL(library)


def install():
    """Makes torch believe in one H200. Call after transformers and megatron-core are imported.

    Returns:
        The mode to work in: in it `waits` counts where values of the device were asked for, which a real device's user waits
        for, by file and function. What has a shape that depends on values (``nonzero``) raises.
    """
    import torch
    import torch.distributed as dist
    import torch.distributed._tools.fake_collectives
    from torch._C._distributed_c10d import FakeWork
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
    from torch.utils._pytree import tree_leaves, tree_map_only

    aten, c10d = torch.ops.aten, torch.ops.c10d
    coalesced = {
        c10d.reduce_scatter_tensor_coalesced_.default,
        c10d.allgather_into_tensor_coalesced_.default,
        c10d.allreduce_coalesced_.default,
    }

    class FakeCuda(FakeTensorMode):
        avoid_device_init = True
        waits: Counter[str] = Counter()
        value = 1
        """of everything that is read"""
        waited = 0
        """all waits so far: what was asked for before one is there after it"""
        sent: dict[int, int]
        """by storage of a copy in main memory for which nobody waited, the waits before it was asked for"""

        def arrived(self, tensor) -> None:
            """What a copy in main memory holds before a wait is nothing that it was copied from."""
            before = self.sent.get(tensor.untyped_storage()._cdata)
            assert before is None or before < self.waited, "a copy is read that nobody has waited for"

        def wait(self) -> None:
            FakeCuda.waited += 1
            frame = sys._getframe(1)
            while "/torch/" in frame.f_code.co_filename or frame.f_code.co_filename == __file__:
                frame = frame.f_back
            self.waits[f"{Path(frame.f_code.co_filename).name}:{frame.f_code.co_name}"] += 1

        def dispatch(self, func, types, args=(), kwargs=None):
            kwargs = kwargs or {}
            tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
            fakes = [tensor for tensor in tensors if isinstance(tensor, FakeTensor)]
            target = kwargs.get("device")
            to_cuda = target is not None and torch.device(target).type == "cuda"
            if not fakes and not to_cuda and func.namespace != "c10d":
                return func(*args, **kwargs)  # what is on the CPU has values
            if func in coalesced:
                return FakeWork().boxed()
            if func is aten._local_scalar_dense.default and fakes[0].constant is None:
                if fakes[0].device.type == "cuda":
                    self.wait()
                else:
                    self.arrived(fakes[0])
                kind = fakes[0].dtype
                return bool(self.value) if kind is torch.bool else float(self.value) if kind.is_floating_point else self.value
            if func is aten._to_copy.default and fakes and target is not None and not to_cuda:
                if kwargs.get("non_blocking"):  # torch copies into pinned memory then
                    copy = self.from_tensor(torch.empty(fakes[0].shape, dtype=kwargs.get("dtype") or fakes[0].dtype))
                    self.sent[copy.untyped_storage()._cdata] = self.waited
                    return copy
                self.wait()
            if to_cuda and tensors and not fakes:
                unpinned = sum(t.nbytes for t in tensors if not hasattr(t, "pinned"))
                if not kwargs.get("non_blocking") or unpinned > STAGED:
                    self.wait()  # for the copy, and so for all that was asked before
                args = tree_map_only(torch.Tensor, self.from_tensor, args)
            return super().dispatch(func, types, args, kwargs)

    mode = FakeCuda(allow_non_fake_inputs=True)
    mode.sent = {}
    _pretend(torch, mode)
    _pretend_triton()

    def everybody_says(found, own, group=None):
        found[:] = [own] * len(found)

    def everybody_gives(own, found=None, **_options):
        if found is not None:
            found[:] = [own] * len(found)

    dist.all_gather_object, dist.gather_object = everybody_says, everybody_gives
    return mode


def _pretend(torch, mode) -> None:
    """torch.cuda, of a machine with one H200."""
    cuda = torch.cuda

    class Stream:
        cuda_stream, device = 0, torch.device("cuda", 0)

        def __init__(self, *_args, **_options): ...
        def wait_stream(self, _stream): ...
        def wait_event(self, _event): ...
        def record_event(self, _event=None):
            return Event()

        def synchronize(self):
            mode.wait()

    class Event:
        def __init__(self, **_options): ...
        def record(self, _stream=None):
            self.at = mode.waited

        def query(self):
            return self.at < mode.waited

        def elapsed_time(self, end):
            assert self.query() and end.query(), "times of events that have not come yet"
            return 1.0

        def wait(self, _stream=None): ...
        def synchronize(self):
            mode.wait()

    class Generators:
        def __getitem__(self, _index):
            return torch.default_generator

    cuda.is_available, cuda.device_count = (lambda: True), (lambda: 1)
    cuda.current_device, cuda.set_device = (lambda: 0), (lambda device: None)
    cuda.get_device_capability, cuda.get_device_name = (lambda device=None: (9, 0)), (lambda device=None: "NVIDIA H200")
    cuda.synchronize = lambda device=None: mode.wait()
    cuda.Stream, cuda.Event, cuda.stream = Stream, Event, lambda _stream: contextlib.nullcontext()
    cuda.current_stream = cuda.default_stream = lambda device=None: Stream()
    cuda.get_rng_state = cuda.random.get_rng_state = lambda device=None: torch.zeros(16, dtype=torch.uint8)
    cuda.set_rng_state = cuda.random.set_rng_state = lambda state, device=None: None
    cuda.manual_seed = cuda.manual_seed_all = lambda _seed: None
    cuda.default_generators = Generators()

    class Generator(torch.Generator):
        def __new__(cls, _device="cpu"):
            return super().__new__(cls)

    torch.Generator = Generator

    def applied(module, fn, recurse=True):
        # torch changes a parameter in place, or swaps it; fake ones can neither, and stay what they are if they have not moved
        for child in module.children() if recurse else ():
            child._apply(fn)
        for name, parameter in module._parameters.items():
            if parameter is not None and (moved := fn(parameter.detach())).device != parameter.device:
                module._parameters[name] = torch.nn.Parameter(moved, parameter.requires_grad)
        for name, buffer in module._buffers.items():
            module._buffers[name] = buffer if buffer is None else fn(buffer)
        return module

    def pinned(tensor, device=None):
        copy = tensor.clone()
        copy.pinned = True
        return copy

    attention = torch.nn.functional.scaled_dot_product_attention

    def attended(query, key, value, attn_mask=None, enable_gqa=False, **options):
        if key.shape[1] != query.shape[1] and (attn_mask is not None or query.dtype is torch.float32):
            raise AssertionError("no fused kernel takes this: all scores would be made")
        return attention(query, key, value, attn_mask, enable_gqa=enable_gqa, **options)

    torch.Tensor.pin_memory = pinned
    torch.nn.functional.scaled_dot_product_attention = attended
    torch.nn.Module._apply = applied
    from megatron.core.tensor_parallel import random

    random._lazy_call, random._set_cuda_rng_state = (lambda call, **_options: call()), (lambda *_args, **_options: None)


def _pretend_triton() -> None:
    """Kernels are launched and do nothing."""
    from triton.runtime.jit import JITFunction

    JITFunction.run = lambda self, *args, **options: None
