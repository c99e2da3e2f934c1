"""What adapters do beside one linear layer: its output with theirs, and its weight with them merged.

    y = W x + scale B A x        A [rank, in], B [out, rank]

With magnitudes (DoRA, Liu et al., arXiv 2402.09353) each row of the sum is brought to a length that is trained:

    y = m / n (W x + scale B A x)        n the lengths of the rows of W + scale B A, through which no gradient goes
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from tulu_mega.bridge.shards import Values

_SLAB = 2**24
"""Elements of a weight that are looked at together for their rows' lengths."""
_ALL = slice(None)


class Adapter(nn.Module):
    """This rank's part of the two thin matrices beside one matrix, not initialised.

    Args:
        a_shape, b_shape: [rank, in] and [out, rank] of the part.
        scale: factor of the product.
        by_columns: whether the matrix is cut along its columns.
        beside: the matrix's parameter, for type and device.
        sequence_parallel: whether the tensor ranks share the tokens.
        magnitudes: whether the rows have lengths of their own.
    """

    def __init__(
        self,
        a_shape: Sequence[int],
        b_shape: Sequence[int],
        scale: float,
        by_columns: bool,
        beside: Tensor,
        sequence_parallel: bool,
        magnitudes: bool,
    ):
        super().__init__()
        self.scale = scale
        kind = dict(dtype=beside.dtype, device=beside.device)
        self.lora_A, self.lora_B = (nn.Parameter(torch.empty(*shape, **kind)) for shape in (a_shape, b_shape))
        cut, copied = ([self.lora_A], [self.lora_B]) if by_columns else ([self.lora_B], [self.lora_A])
        if magnitudes:
            self.lora_magnitude_vector = nn.Parameter(torch.empty(b_shape[0], **kind))
            (copied if by_columns else cut).append(self.lora_magnitude_vector)
        for each in cut:
            set_tensor_model_parallel_attributes(each, is_parallel=True, dim=int(by_columns), stride=1)
        for each in copied:
            set_tensor_model_parallel_attributes(each, is_parallel=False, dim=-1, stride=1)
            each.sequence_parallel = sequence_parallel  # it sees its own tokens alone: megatron-core sums the gradients

    def product(self, rows: slice, columns: slice) -> Tensor:
        """A box of scale B A, in float32."""
        return self.lora_B[rows].float() @ self.lora_A[:, columns].float() * self.scale


@dataclass(frozen=True)
class Layout:
    """How the ranks share the tokens and the layers."""

    sequence_parallel: bool
    group: ProcessGroup


@dataclass(frozen=True)
class CutByRows:
    """The adapters of a column-parallel layer: A x is made of the tokens at hand, then every rank multiplies its rows of B."""

    weight: Values
    adapters: tuple[Adapter, ...]
    parts: tuple[tuple[int | None, int, int], ...]
    """what the layer's output is made of: which adapter (None: a matrix without), first row of its B, rows"""
    layout: Layout
    magnitudes: bool

    def __call__(self, linear: nn.Module, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor | None]):
        layout, (product, bias) = self.layout, output
        narrow = F.linear(inputs[0], torch.cat([adapter.lora_A for adapter in self.adapters]))
        if layout.sequence_parallel:  # backward: reduce-scatter of the ranks' partial gradients
            narrow = gather_from_sequence_parallel_region(narrow, tensor_parallel_output_grad=True, group=layout.group)
        else:  # backward: all-reduce of them
            narrow = copy_to_tensor_model_parallel_region(narrow, group=layout.group)
        split = narrow.split([len(adapter.lora_A) for adapter in self.adapters], dim=-1)
        made = [F.linear(each * adapter.scale, adapter.lora_B) for each, adapter in zip(split, self.adapters, strict=True)]
        columns = [
            product.new_zeros(*product.shape[:-1], rows) if which is None else made[which][..., first : first + rows]
            for which, first, rows in self.parts
        ]
        delta = torch.cat(columns, dim=-1)
        if not self.magnitudes:
            return product + delta, bias
        return _scaled(linear, product, bias, delta, self.factors(self.lengths())), bias

    def factors(self, lengths: Tensor) -> Tensor:
        """m / n of every row, float32; 1 for those of matrices without an adapter.

        Args:
            lengths: of `lengths`.
        """
        lengths_of = lengths.split([rows for *_, rows in self.parts])
        return torch.cat(
            [
                torch.ones_like(own) if which is None else self._magnitudes(which)[first : first + rows] / own
                for own, (which, first, rows) in zip(lengths_of, self.parts, strict=True)
            ]
        )

    def _magnitudes(self, which: int) -> Tensor:
        return self.adapters[which].lora_magnitude_vector.float()

    @torch.no_grad()
    def lengths(self) -> Tensor:
        """Of the rows of the layer's weight with the products added, float32."""
        rows = sum(part[-1] for part in self.parts)
        return _squares(self, rows, self.adapters[0].lora_A.shape[1]).sqrt()

    @torch.no_grad()
    def begin(self) -> None:
        """Makes the magnitudes those lengths."""
        for own, (which, first, rows) in zip(self.lengths().split([part[-1] for part in self.parts]), self.parts, strict=True):
            if which is not None:
                self.adapters[which].lora_magnitude_vector[first : first + rows].copy_(own)

    def added(self, rows: slice, columns: slice) -> Tensor:
        """A box of the products that merging adds to the layer's weight, in float32."""
        made, at = [], 0
        for which, first, count in self.parts:
            low, high = max(rows.start, at), min(rows.stop, at + count)
            if low < high and which is None:
                made.append(torch.zeros(high - low, columns.stop - columns.start, device=self.adapters[0].lora_A.device))
            elif low < high:
                made.append(self.adapters[which].product(slice(first + low - at, first + high - at), columns))
            at += count
        return torch.cat(made)


@dataclass(frozen=True)
class CutByColumns:
    """The adapter of a row-parallel layer: the ranks' shares of A x are added up, then each has all of B."""

    weight: Values
    adapter: Adapter
    layout: Layout
    magnitudes: bool

    def __call__(self, linear: nn.Module, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor | None]):
        layout, (product, bias) = self.layout, output
        narrow = F.linear(inputs[0], self.adapter.lora_A) * self.adapter.scale
        if layout.sequence_parallel:
            narrow = reduce_scatter_to_sequence_parallel_region(narrow, group=layout.group)
        else:
            narrow = reduce_from_tensor_model_parallel_region(narrow, group=layout.group)
        delta = F.linear(narrow, self.adapter.lora_B)
        if not self.magnitudes:
            return product + delta, bias
        return _scaled(linear, product, bias, delta, self.factors(self.lengths())), bias

    def factors(self, lengths: Tensor) -> Tensor:
        """m / n of every row, float32.

        Args:
            lengths: of `lengths`.
        """
        return self.adapter.lora_magnitude_vector.float() / lengths

    @torch.no_grad()
    def lengths(self) -> Tensor:
        """Of the rows of the layer's whole weight with the products added, float32. A collective of the tensor ranks."""
        squares = _squares(self, len(self.adapter.lora_B), self.adapter.lora_A.shape[1])
        if self.layout.group.size() > 1:
            dist.all_reduce(squares, group=self.layout.group)
        return squares.sqrt()

    @torch.no_grad()
    def begin(self) -> None:
        """Makes the magnitudes those lengths."""
        self.adapter.lora_magnitude_vector.copy_(self.lengths())

    def added(self, rows: slice, columns: slice) -> Tensor:
        """A box of the product that merging adds to the layer's weight, in float32."""
        return self.adapter.product(rows, columns)


def _squares(layer: CutByRows | CutByColumns, rows: int, columns: int) -> Tensor:
    """Sums of the squares in the rows of this rank's weight with the products added, some rows at a time."""
    step = max(1, _SLAB // columns)
    boxes = [(slice(at, min(rows, at + step)), slice(0, columns)) for at in range(0, rows, step)]
    return torch.cat([(layer.weight[box].float() + layer.added(*box)).square_().sum(1) for box in boxes])


def _scaled(linear: nn.Module, product: Tensor, bias: Tensor | None, delta: Tensor, factors: Tensor) -> Tensor:
    """The rows of a layer's output, without a bias that is in it, brought to their lengths."""
    factors = factors.to(product.dtype)
    own = linear.bias if bias is None else None
    if own is None or not own.numel():
        return (product + delta) * factors
    return (product - own + delta) * factors + own


class MergedWeight:
    """A layer's weight with its adapters merged, in float32 and rounded once: made when it is read, a box at a time.

    Magnitudes are merged as of the last :meth:`look`, a collective of the tensor ranks, since rows lie on several ranks.

    Args:
        weight: the frozen one.
        adapters: beside it.
    """

    def __init__(self, weight: Values, adapters: CutByRows | CutByColumns):
        self.device, self.dtype, self.itemsize = weight.device, weight.dtype, weight.itemsize
        self._weight, self._adapters, self._factors = weight, adapters, None

    @torch.no_grad()
    def look(self) -> None:
        """Makes the magnitudes' factors those of now."""
        if self._adapters.magnitudes:
            self._factors = self._adapters.factors(self._adapters.lengths())

    @torch.no_grad()
    def __getitem__(self, box: tuple[slice, ...]) -> Tensor:
        merged = self._weight[box].float() + self._adapters.added(*box)
        if self._adapters.magnitudes:
            merged *= self._factors[box[0], None]
        return merged.to(self.dtype)
