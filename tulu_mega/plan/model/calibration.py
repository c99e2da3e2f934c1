"""The two rates that are fitted, the published runs they are fitted to, and the published runs they are not.

Megatron-Bridge's performance pages (docs/performance-summary-archive.md and src/megatron/bridge/perf_recipes/llama/h100 in
NVIDIA-NeMo/Megatron-Bridge) give model TFLOP/s a GPU on DGX H100 nodes. The four of these: FP8 tensorwise with FP8
parameters, one sequence a micro-batch, gradients reduced in bf16, all logits at once (fused cross-entropy), overlapped gradient
reduction and parameter gathering, tensor-parallel messages through user buffers, no recomputation. Model FLOPs are counted as
`flops` counts them: 51.48 GFLOP a token of 8B, 449.2 of 70B, 2,523 of 405B at 8,192 tokens, which is what the published pairs of
tokens/s and TFLOP/s have.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tulu_mega.config import ParallelSettings
from tulu_mega.layout.hardware import GPUS
from tulu_mega.plan.model.costs import Rates
from tulu_mega.plan.model.job import Job, Pack
from tulu_mega.plan.model.kernels import Kernels
from tulu_mega.plan.model.timing import train_step

RATES = Rates(products=0.5881, tensor_exposed=0.7417)
"""What `fit` gives for the two runs of `CALIBRATION`."""


@dataclass(frozen=True)
class Published:
    """A published, measured run."""

    name: str
    architecture: str
    """name in `examples/architectures`"""
    gpus: int
    batch: int
    length: int
    parallel: Mapping[str, Any]
    tflops: float
    """model TFLOP/s a GPU"""
    split: tuple[int, ...] | None = None
    """layers of every virtual stage"""
    fsdp: bool = False
    fp8: bool = True
    user_buffers: bool = True
    """tensor-parallel messages overlap products"""
    overlap: bool = True
    """whether gradients and parameters are communicated during passes"""
    grad_bytes: int = 2

    def job(self, config: Mapping[str, Any]) -> Job:
        """The run as the planner sees it.

        Args:
            config: of the architecture.
        """
        layout = ParallelSettings(**self.parallel, overlap_grad_reduce=self.overlap, overlap_param_gather=self.overlap)
        replicas = self.gpus // layout.model_parallel
        pack = Pack(self.length, (self.length,), self.length)
        return Job(
            config,
            layout,
            GPUS["h100"],
            ((pack,) * (self.batch // replicas),) * replicas,
            fp8=self.fp8,
            fp8_weights=self.fp8,
            kernels=Kernels(user_buffers=self.user_buffers),
            grad_bytes=self.grad_bytes,
            fsdp=self.fsdp,
            full_logits=True,
            split=self.split,
        )


CALIBRATION = (
    # 25.11 container, "LLAMA3_8B": FSDP 8
    Published("Llama 3.1 8B, pre-training", "llama3.1_8b", 8, 128, 8192, {}, 744.0, fsdp=True),
    # 26.04.01 container, "LLAMA3_70B"; the recipe's layout is Et*2|(t*2|)*34,t*3|(t*2|)*3,tL
    Published(
        "Llama 3 70B, pre-training",
        "llama3.1_70b",
        64,
        256,
        8192,
        dict(tensor=4, pipeline=8, virtual_pipeline=5),
        731.0,
        split=(*[2] * 35, 3, *[2] * 3, 1),
    ),
)
HELD_OUT = (
    # 26.04.01 container, "LLAMA3.1_405B"; the recipe counts embedding and loss as a layer each when it splits
    Published(
        "Llama 3.1 405B, pre-training",
        "llama3.1_405b",
        1024,
        1536,
        8192,
        dict(tensor=8, pipeline=8, context=2, virtual_pipeline=8),
        827.0,
        split=(1, *[2] * 62, 1),
    ),
    # 26.06 container, "LLAMA3_70B" SFT, packed rows of 4,096; the recipe splits evenly
    Published(
        "Llama 3 70B, SFT packed",
        "llama3.1_70b",
        32,
        32,
        4096,
        dict(tensor=4, pipeline=4, virtual_pipeline=5),
        710.0,
        split=(4,) * 20,
    ),
)
HELD_OUT_BF16 = (
    # examples/model_verification_cards/qwen3-8b/card.yaml of 21 July 2026, recipe qwen3_8b_pretrain_16gpu_h100_bf16_config: bf16,
    # no user buffers, fused cross-entropy; 10,456 tokens/s a GPU
    Published("Qwen3 8B, pre-training in bf16", "qwen3_8b", 16, 1024, 4096, {}, 512.7, fp8=False, user_buffers=False),
)
"""Added later, in another precision; the bound is 15%."""
OUTSIDE = (
    # The same card, recipe qwen3_8b_sft_4gpu_h100_bf16_config: packed rows of 2,048, 99.3% full, counted as one sequence each;
    # no sequence parallelism, no overlap, float32 gradients; 2,207 tokens/s a GPU. The card says of its figures that the model is
    # not performance-tuned, and here 232 ms pass for a micro-batch whose arithmetic takes a quarter of that.
    Published(
        "Qwen3 8B, SFT packed in bf16",
        "qwen3_8b",
        4,
        32,
        2048,
        dict(tensor=4, sequence=False),
        101.6,
        fp8=False,
        user_buffers=False,
        overlap=False,
        grad_bytes=4,
    ),
)
"""Runs that the plan misses by far, and why."""


def predicted(run: Published, config: Mapping[str, Any], rates: Rates = RATES) -> float:
    """Model TFLOP/s a GPU of a run."""
    return train_step(run.job(config), rates).flops_per_gpu / 1e12


def fit(config_of: Callable[[str], Mapping[str, Any]]) -> Rates:
    """The rates that give the calibration runs' figures: products from the run without tensor parallelism, what is exposed of
    its collectives from the other.

    Args:
        config_of: config.json of an architecture by name.

    Raises:
        ValueError: no rate between 0 and 1 does.
    """
    alone, divided = CALIBRATION
    products = _solve(lambda share: predicted(alone, config_of(alone.architecture), Rates(share, 0.0)) - alone.tflops)
    exposed = _solve(lambda share: divided.tflops - predicted(divided, config_of(divided.architecture), Rates(products, share)))
    return Rates(products, exposed)


def _solve(rising: Callable[[float], float], steps: int = 14) -> float:
    """Zero of a rising function between 0 and 1 to 1e-4."""
    low, high = 1e-3, 1.0
    if rising(low) > 0 or rising(high) < 0:
        raise ValueError("the calibration runs cannot be had with any rate between 0 and 1")
    for _ in range(steps):
        middle = (low + high) / 2
        low, high = (middle, high) if rising(middle) < 0 else (low, middle)
    return (low + high) / 2
