"""How bench_kernels.py measures: times, memory and CUDA graphs of what a device does; a failure ends a part and no more."""

from __future__ import annotations

import contextlib
import platform
import timeit
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from triton.testing import do_bench

Figures = Iterator[tuple[str, Any]]
"""Names and what was measured, as soon as it was."""


class Bench:
    """A device, and how time and memory are taken there."""

    def __init__(self, device: torch.device):
        self.device, self.on_gpu = device, device.type == "cuda"
        self.failed: list[str] = []
        """what raised an error, peers excepted"""

    def measure(self, part: str, figures: Figures, into: dict[str, Any]) -> None:
        """Collects a part's figures and prints a line for each; an error ends the part and no other."""
        print(f"== {part}", flush=True)

        def collect() -> None:
            for name, value in figures:
                into[name] = value
                for key, figure in (value if isinstance(value, dict) else {"": value}).items():
                    print(f"{name!s:>36} {key:<16} {figure}", flush=True)

        why = self.attempt(part, collect)
        if why is not None:
            into |= why
            print(f"{'failed':>36} {'':<16} {why['failed']}", flush=True)

    def attempt(self, what: str, action: Callable[[], Any], peer: bool = False) -> Any:
        """What an action gives, or `failed` and why; a peer may run out of memory or be missing, anything else is noted."""
        try:
            return action()
        except Exception as error:
            if not peer:
                self.failed.append(what)
                traceback.print_exc()
            return {"failed": f"{type(error).__name__}: {str(error)[:200]}"}
        finally:
            if self.on_gpu:
                with contextlib.suppress(RuntimeError):  # of a device that is lost
                    torch.cuda.empty_cache()

    def machine(self) -> dict[str, Any]:
        name = torch.cuda.get_device_name(self.device) if self.on_gpu else platform.processor() or "cpu"
        return {"device": name, "python": platform.python_version(), "torch": torch.__version__}

    def random(self, *shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
        generator = torch.Generator(self.device).manual_seed(seed)
        return torch.randn(shape, generator=generator, device=self.device).to(dtype)

    def milliseconds(self, action: Callable[[], Any]) -> float:
        """Median of a second of runs, each reading from memory and not from a cache; on a CPU the best of three."""
        if self.on_gpu:
            return round(do_bench(action, warmup=200, rep=1000, return_mode="median"), 4)
        action()
        return round(1e3 * min(timeit.repeat(action, number=1, repeat=3)), 4)

    def captured(self, action: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
        """A CUDA graph of an action, and what it gave there; before, it runs twice on another stream, as capturing wants it."""
        current, side = torch.cuda.current_stream(), torch.cuda.Stream()
        side.wait_stream(current)
        with torch.cuda.stream(side):
            action(), action()
        current.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            held = action()
        return graph, held

    def peak(self, action: Callable[[], Any]) -> int | None:
        """Bytes beyond what was there before; on a GPU alone."""
        if not self.on_gpu:
            return None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        action()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
