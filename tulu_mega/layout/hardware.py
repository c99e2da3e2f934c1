"""Speeds and sizes of GPUs, their links and their nodes, from data sheets; dense, without sparsity.

Units: bytes, bytes/s in one direction, FLOP/s.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from tulu_mega.errors import UserError, nearest


@dataclass(frozen=True)
class Gpu:
    """A GPU in a node of eight, as the vendor's reference machine has it."""

    name: str
    memory: int
    """bytes that torch can allocate: the total capacity in its out-of-memory message, some hundred MiB less than in nvidia-smi"""
    bf16: float
    """dense peak, FLOP/s, rounded to 1e12"""
    fp8: float
    """dense peak, FLOP/s; bf16's where there is none"""
    fp32: float
    """without tensor cores, FLOP/s"""
    bandwidth: float
    """bandwidth of its memory, bytes/s"""
    nvlink: float
    """to the other GPUs of its node, bytes/s in one direction"""
    network: float
    """to other nodes, bytes/s in one direction and for each GPU"""
    host: float
    """to the node's main memory, bytes/s in one direction"""
    per_node: int = 8
    domain: int = 8
    """GPUs that NVLink (or, without it, the node's PCIe) joins"""


_GIB = 2**30
GPUS: dict[str, Gpu] = {
    # Memory: the least of the totals in published out-of-memory messages of torch. A100 79.14 to 79.25 GiB (nvidia-smi: 81,920
    # MiB), H100 79.10 to 79.19 (81,559 MiB), H200 139.72 to 139.81 (143,771 MiB), B200 178.35, GB200 184.31, RTX 4090 23.64
    # (24,564 MiB).
    # A100 80GB data sheet (2021): 312 TFLOP/s bf16, 2,039 GB/s, NVLink 600 GB/s both ways, PCIe 4 x16. DGX A100 80GB: eight
    # 200 Gb/s compute NICs.
    "a100": Gpu("a100", int(79.14 * _GIB), 312e12, 312e12, 19.5e12, 2.039e12, 300e9, 25e9, 32e9),
    # H100 SXM data sheet: 1,979 bf16 and 3,958 FP8 TFLOP/s with sparsity, half of them without; 3.35 TB/s; NVLink 900 GB/s both
    # ways; PCIe 5 x16. DGX H100: eight 400 Gb/s NICs.
    "h100": Gpu("h100", int(79.1 * _GIB), 989e12, 1978.9e12, 67e12, 3.35e12, 450e9, 50e9, 64e9),
    # H200 SXM data sheet: H100's compute, 141 GB at 4.8 TB/s.
    "h200": Gpu("h200", int(139.72 * _GIB), 989e12, 1978.9e12, 67e12, 4.8e12, 450e9, 50e9, 64e9),
    # HGX B200 (NVIDIA Blackwell architecture brief): 2,250 bf16 and 4,500 FP8 TFLOP/s dense at 1,000 W, 8 TB/s (DGX B200's data
    # sheet: 64 TB/s for eight), NVLink 1.8 TB/s both ways. Its NICs: 400 Gb/s.
    "b200": Gpu("b200", int(178.35 * _GIB), 2250e12, 4500e12, 75e12, 8.0e12, 900e9, 50e9, 64e9),
    # GB200 NVL72 (its data sheet, for 72 GPUs: 360 PFLOP/s bf16 and 720 FP8 with sparsity, 576 TB/s, NVLink 130 TB/s both ways):
    # 72 GPUs that NVLink joins, four to a node; 400 Gb/s NICs; 900 GB/s both ways to two GPUs' Grace.
    "gb200": Gpu("gb200", int(184.31 * _GIB), 2500e12, 5000e12, 80e12, 8.0e12, 900e9, 50e9, 225e9, per_node=4, domain=72),
    # GeForce RTX 4090 (NVIDIA Ada GPU architecture, appendix A): 165.2 bf16 and 330.3 FP8 TFLOP/s dense with float32 sums, 82.6
    # without tensor cores, 1,008 GB/s; no NVLink: PCIe 4 x16 between GPUs too. A network card of 100 Gb/s for eight is assumed.
    "rtx4090": Gpu("rtx4090", int(23.64 * _GIB), 165.2e12, 330.3e12, 82.6e12, 1.008e12, 32e9, 1.5625e9, 32e9),
}
_SPELLINGS = frozenset("80g 80gb 141gb 24gb sxm sxm4 sxm5 sxm6 hbm3 hbm3e nvl72 nvidia geforce dgx hgx".split())
"""Words that do not distinguish GPUs of the table."""


PEAKS: dict[str, tuple[float, float]] = {
    # data sheets of what is not in a node of eight: H100 NVL, H100 PCIe; RTX 4090
    "H100 NVL": (835e12, 60e12),
    "H100 PCIe": (756e12, 51e12),
    "RTX 4090": (GPUS["rtx4090"].bf16, GPUS["rtx4090"].fp32),
    **{name: (GPUS[gpu].bf16, GPUS[gpu].fp32) for name, gpu in
       {"A100": "a100", "H100": "h100", "H200": "h200", "GH200": "h200", "B200": "b200", "GB200": "gb200"}.items()},
}  # fmt: skip
"""bf16 and fp32 (without TF32, as torch computes by default) peaks, FLOP/s, by words of the name that the driver gives."""


def named_peak(name: str, fp32: bool) -> float | None:
    """Peak FLOP/s of a GPU by the name its driver gives; None when unknown."""
    known = [key for key in PEAKS if all(word in name.replace("-", " ").split() for word in key.split())]
    return PEAKS[max(known, key=len)][int(fp32)] if known else None


def gpu_named(name: str, setting: str = "gpu") -> Gpu:
    """A GPU of the table, by its name there or what the driver calls it (``A100-80GB``, ``NVIDIA H100 80GB HBM3``).

    Raises:
        UserError: naming those that are in it.
    """
    words = [word for word in re.split(r"[\s_/-]+", name.lower()) if word not in _SPELLINGS]
    short = "".join(words)
    if found := GPUS.get(short) or GPUS.get(f"rtx{short}"):
        return found
    if name.lower().startswith("cpu"):
        raise UserError(
            f"{setting} = {name!r}: what a run on CPUs takes is not predicted, plans are for GPUs ({', '.join(GPUS)}); of a run "
            "on CPUs the first steps tell: memory_gib and the seconds in its metrics.jsonl"
        )
    within = [known for known in GPUS if known in words]
    close = f"; did you mean {within[0]!r}?" if within else nearest(short, list(GPUS))
    raise UserError(f"{setting} = {name!r} is not known{close}; known: {', '.join(GPUS)}")


def link(gpu: Gpu, size: int, stride: int) -> float:
    """Bytes/s that a rank of a group sends, in one direction.

    Ranks of a node come one after another. A group within what NVLink joins has it; one that spans more rings through the
    network cards of those of its ranks that share it, at most NVLink's rate.

    Args:
        size: ranks in the group.
        stride: distance of neighbours in the world's order.
    """
    if size * stride <= gpu.domain:
        return gpu.nvlink
    return min(gpu.nvlink, gpu.network * max(1, gpu.domain // stride))
