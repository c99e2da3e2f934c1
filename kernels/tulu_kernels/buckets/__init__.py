"""Many boxes of tensors to and from one flat bucket, converted on the way, in a few launches.

    plan      where boxes lie in a bucket; what a launch has to know of the boxes that it copies
    kernel    all boxes of a kind in one launch, with Triton

Packing copies boxes to `BucketPlan.views` of a bucket, unpacking copies these to boxes.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from tulu_kernels.buckets.plan import BucketPlan, launches, plan_bucket
from tulu_kernels.dispatch import Backend, chosen

__all__ = ["BoxCopies", "BucketPlan", "plan_bucket"]


class BoxCopies:
    """Copies the same boxes again and again: planned at the first call, and anew when one of them has moved."""

    def __init__(self, backend: Backend = "auto"):
        """
        Args:
            backend: see `dispatch.chosen`. Torch copies one box after another.
        """
        self._backend = backend
        self._key: tuple = ()
        self._tables: list = []

    def __call__(self, sources: Sequence[Tensor], targets: Sequence[Tensor]) -> None:
        """``target.copy_(source)`` of every pair; what becomes bf16 is rounded to nearest even.

        Args:
            sources: of up to two dimensions, the last of them adjacent in memory; bf16 or float32, all on one device.
            targets: of the same shapes, there as well; they do not overlap.

        Raises:
            ValueError: a pair that differs in shape, or one that the kernel cannot copy.
        """
        for source, target in zip(sources, targets, strict=True):
            if source.shape != target.shape:
                raise ValueError(f"a source of {list(source.shape)} and a target of {list(target.shape)}: expected equal shapes")
        if not sources or chosen("buckets", targets[0].device, self._backend) == "torch":
            for source, target in zip(sources, targets, strict=True):
                target.copy_(source)
            return
        from tulu_kernels.buckets import kernel

        key = tuple((box.data_ptr(), box.dtype, box.shape, box.stride()) for box in (*sources, *targets))
        if key != self._key:
            self._tables = [kernel.Tables.of(launch, targets[0].device) for launch in launches(sources, targets)]
            self._key = key
        for table in self._tables:
            kernel.copy(sources, targets, table)
