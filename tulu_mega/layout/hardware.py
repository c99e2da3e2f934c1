"""What GPUs, their links and their nodes can do: figures of data sheets, dense, without sparsity.

Units: bytes, bytes/s in one direction, FLOP/s.
"""

from __future__ import annotations

from dataclasses import dataclass

from tulu_mega.errors import UserError, nearest


@dataclass(frozen=True)
class Gpu:
    """A GPU in a node of eight, as the vendor's reference machine has it."""

    name: str
    memory: int
    """that the driver reports, in bytes"""
    bf16: float
    """dense peak, FLOP/s, rounded to 1e12"""
    fp8: float
    """dense peak, FLOP/s; bf16's where there is none"""
    fp32: float
    """without tensor cores, FLOP/s"""
    bandwidth: float
    """of its memory, bytes/s"""
    nvlink: float
    """to the other GPUs of its node, bytes/s in one direction"""
    network: float
    """to other nodes, bytes/s in one direction and for each GPU"""
    host: float
    """to the node's main memory, bytes/s in one direction"""
    per_node: int = 8


_GIB = 2**30
GPUS: dict[str, Gpu] = {
    # A100 80GB data sheet (2021): 312 TFLOP/s bf16, 2,039 GB/s, NVLink 600 GB/s both ways, PCIe 4 x16. DGX A100 80GB: eight
    # 200 Gb/s compute NICs. The driver reports 81,920 MiB of it.
    "a100": Gpu("a100", 80 * _GIB, 312e12, 312e12, 19.5e12, 2.039e12, 300e9, 25e9, 32e9),
    # H100 SXM data sheet: 1,979 bf16 and 3,958 FP8 TFLOP/s with sparsity, half of them without; 3.35 TB/s; NVLink 900 GB/s both
    # ways; PCIe 5 x16. DGX H100: eight 400 Gb/s NICs. The driver reports 81,559 MiB.
    "h100": Gpu("h100", 81_559 * 2**20, 989e12, 1978.9e12, 67e12, 3.35e12, 450e9, 50e9, 64e9),
    # H200 SXM data sheet: H100's compute, 141 GB at 4.8 TB/s. The driver reports 143,771 MiB.
    "h200": Gpu("h200", 143_771 * 2**20, 989e12, 1978.9e12, 67e12, 4.8e12, 450e9, 50e9, 64e9),
    # HGX B200 (NVIDIA Blackwell architecture brief): 2,250 bf16 and 4,500 FP8 TFLOP/s dense at 1,000 W, 8 TB/s (DGX B200's data
    # sheet: 64 TB/s for eight), NVLink 1.8 TB/s both ways; 180 GB of 192 in DGX B200 (1,440 GB for eight). Its NICs: 400 Gb/s.
    "b200": Gpu("b200", 180 * 10**9, 2250e12, 4500e12, 75e12, 8.0e12, 900e9, 50e9, 64e9),
}


PEAKS: dict[str, tuple[float, float]] = {
    # data sheets of what is not in a node of eight: H100 NVL, H100 PCIe
    "H100 NVL": (835e12, 60e12),
    "H100 PCIe": (756e12, 51e12),
    **{name: (GPUS[gpu].bf16, GPUS[gpu].fp32) for name, gpu in
       {"A100": "a100", "H100": "h100", "H200": "h200", "GH200": "h200", "B200": "b200"}.items()},
}  # fmt: skip
"""bf16 and fp32 (without TF32, as torch computes by default) peaks, FLOP/s, by words of the name that the driver gives."""


def named_peak(name: str, fp32: bool) -> float | None:
    """Peak FLOP/s of a GPU by the name its driver gives; None when unknown."""
    known = [key for key in PEAKS if all(word in name.replace("-", " ").split() for word in key.split())]
    return PEAKS[max(known, key=len)][int(fp32)] if known else None


def gpu_named(name: str) -> Gpu:
    """A GPU of the table.

    Raises:
        UserError: naming those that are in it.
    """
    if found := GPUS.get(name.lower()):
        return found
    if name.lower().startswith("cpu"):
        raise UserError(
            f"gpu = {name!r}: what a run on CPUs takes is not predicted, plans are for GPUs ({', '.join(GPUS)}); of a run on "
            "CPUs the first steps tell: memory_gib and the seconds in its metrics.jsonl"
        )
    raise UserError(f"gpu = {name!r} is not known{nearest(name, list(GPUS))}; known: {', '.join(GPUS)}")


def link(gpu: Gpu, size: int, stride: int) -> float:
    """Bytes/s that a rank of a group sends, in one direction.

    Ranks of a node come one after another. A group within a node has NVLink; one that spans nodes rings through the network
    cards of those of its ranks that share a node, at most NVLink's rate.

    Args:
        size: ranks in the group.
        stride: distance of neighbours in the world's order.
    """
    if size * stride <= gpu.per_node:
        return gpu.nvlink
    return min(gpu.nvlink, gpu.network * max(1, gpu.per_node // stride))
