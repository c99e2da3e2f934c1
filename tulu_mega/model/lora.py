"""Low-rank adapters beside the frozen linear layers of a model (LoRA, Hu et al., arXiv 2106.09685).

    y = W x + scale B A x        A [rank, in], B [out, rank]

One adapter for each Hugging Face matrix, as PEFT has it, also where megatron-core keeps several matrices in one parameter. An
adapter is cut as its matrix is (`bridge.adapters`), so that between tensor ranks nothing wider than the rank is sent. Adapters
lie in a tree of their own under the model, named as PEFT names them; what they make is added to the output of their layer.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from tulu_mega.bridge.adapters import ROOT, A, B, adapter_family, adapter_name, rows_of
from tulu_mega.bridge.rules import Config, Cut, Family
from tulu_mega.bridge.shards import exportable, global_name
from tulu_mega.config.lora import LoraSettings
from tulu_mega.distributed.topology import Topology


class Adapter(nn.Module):
    """This rank's part of the two thin matrices beside one matrix, not initialised.

    Args:
        a_shape, b_shape: [rank, in] and [out, rank] of the part.
        scale: factor of the product.
        by_columns: whether the matrix is cut along its columns.
        beside: the matrix's parameter, for type and device.
        sequence_parallel: whether the tensor ranks share the tokens.
    """

    def __init__(
        self,
        a_shape: Sequence[int],
        b_shape: Sequence[int],
        scale: float,
        by_columns: bool,
        beside: Tensor,
        sequence_parallel: bool,
    ):
        super().__init__()
        self.scale = scale
        self.lora_A, self.lora_B = (
            nn.Parameter(torch.empty(*shape, dtype=beside.dtype, device=beside.device)) for shape in (a_shape, b_shape)
        )
        cut, copied = (self.lora_A, self.lora_B) if by_columns else (self.lora_B, self.lora_A)
        set_tensor_model_parallel_attributes(cut, is_parallel=True, dim=1 if by_columns else 0, stride=1)
        set_tensor_model_parallel_attributes(copied, is_parallel=False, dim=-1, stride=1)
        copied.sequence_parallel = sequence_parallel  # it sees its own tokens alone: megatron-core sums the gradients

    def product(self, rows: slice, columns: slice) -> Tensor:
        """A box of scale B A, in float32."""
        return self.lora_B[rows].float() @ self.lora_A[:, columns].float() * self.scale


@dataclass(frozen=True)
class _Layout:
    sequence_parallel: bool
    group: ProcessGroup


@dataclass(frozen=True)
class _CutByRows:
    """The adapters of a column-parallel layer: A x is made of the tokens at hand, then every rank multiplies its rows of B."""

    adapters: tuple[Adapter, ...]
    parts: tuple[tuple[int | None, int, int], ...]
    """what the layer's output is made of: which adapter (None: a matrix without), first row of its B, rows"""
    layout: _Layout

    def __call__(self, _linear: nn.Module, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor | None]):
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
        return product + torch.cat(columns, dim=-1), bias

    def added(self, rows: slice, columns: slice) -> Tensor:
        """A box of what merging adds to the layer's weight, in float32."""
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
class _CutByColumns:
    """The adapter of a row-parallel layer: the ranks' shares of A x are added up, then each has all of B."""

    adapter: Adapter
    layout: _Layout

    def __call__(self, _linear: nn.Module, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor | None]):
        layout, (product, bias) = self.layout, output
        narrow = F.linear(inputs[0], self.adapter.lora_A) * self.adapter.scale
        if layout.sequence_parallel:
            narrow = reduce_scatter_to_sequence_parallel_region(narrow, group=layout.group)
        else:
            narrow = reduce_from_tensor_model_parallel_region(narrow, group=layout.group)
        return product + F.linear(narrow, self.adapter.lora_B), bias

    def added(self, rows: slice, columns: slice) -> Tensor:
        """A box of what merging adds to the layer's weight, in float32."""
        return self.adapter.product(rows, columns)


@dataclass(frozen=True)
class MergedWeight:
    """A layer's weight with its adapters' products added, in float32 and rounded once: made when it is read, a box at a time."""

    weight: Tensor
    adapters: _CutByRows | _CutByColumns

    @property
    def device(self) -> torch.device:
        """The weight's."""
        return self.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The weight's."""
        return self.weight.dtype

    @property
    def itemsize(self) -> int:
        """The weight's."""
        return self.weight.itemsize

    @torch.no_grad()
    def __getitem__(self, box: tuple[slice, ...]) -> Tensor:
        held = self.weight[box]
        return (held.float() + self.adapters.added(*box)).to(held.dtype)


class AdapterTree(nn.Module):
    """The tree of a chunk's adapters: ``model.layers.3.self_attn.q_proj.lora_A``, layers numbered in the whole model."""

    def __init__(self) -> None:
        super().__init__()
        self._merged: dict[int, MergedWeight] = {}

    def add(self, path: str, adapter: Adapter) -> None:
        """Puts an adapter at its place."""
        *above, name = path.split(".")
        place: nn.Module = self
        for each in above:
            if each not in dict(place.named_children()):
                place.add_module(each, nn.Module())
            place = place.get_submodule(each)
        place.add_module(name, adapter)

    def join(self, linear: nn.Module, adapters: _CutByRows | _CutByColumns) -> None:
        """Adds what adapters make to a linear layer's output, from now on."""
        self._merged[id(linear.weight)] = MergedWeight(linear.weight, adapters)
        linear.register_forward_hook(adapters)

    def merged(self, parameter: Tensor) -> Tensor | MergedWeight:
        """What a parameter is with its adapters merged; itself where it has none."""
        return self._merged.get(id(parameter), parameter)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """megatron-core's description for distributed checkpoints: names are the whole model's, so that any layout reads them."""
        held = self.state_dict(prefix="", keep_vars=True)
        cut = {name: value.partition_dim for name, value in held.items() if value.tensor_model_parallel}
        return make_sharded_tensors_for_checkpoint(held, prefix, cut, sharded_offsets)


def attach(chunks: Sequence[nn.Module], lora: LoraSettings, family: Family, config: Config, here: Topology) -> None:
    """Freezes a rank's chunks, but for a reward model's head, and gives them adapters, which are to be loaded or drawn next.

    Args:
        family: the model's.
        config: its config.json.

    Raises:
        UserError: a size that the tensor ranks do not divide.
    """
    for chunk in chunks:
        chunk.requires_grad_(False)
        if family.reward and chunk.post_process:
            chunk.output_layer.requires_grad_(True)
        tree = AdapterTree()
        layout = _Layout(chunk.config.sequence_parallel, here.tensor_group)
        for name, _weight in list(chunk.named_parameters()):
            if name.endswith(".weight"):
                linear = chunk.get_submodule(name.removesuffix(".weight"))
                _attach(tree, linear, global_name(chunk, name), lora, family, config, here, layout)
        chunk.adapters = tree
        if chunk.pre_process:  # what is computed again backward has to hang on something that wants a gradient
            chunk.embedding.register_forward_hook(_wanting_gradient)


def _wanting_gradient(_embedding: nn.Module, _inputs: tuple, embedded: Tensor) -> Tensor:
    return embedded.requires_grad_() if torch.is_grad_enabled() else embedded


def _attach(
    tree: AdapterTree,
    linear: nn.Module,
    name: str,
    lora: LoraSettings,
    family: Family,
    config: Config,
    here: Topology,
    layout: _Layout,
) -> None:
    rows = rows_of(family, name, config, here)
    if not any(map(lora.has, rows)):
        return
    thin, by_columns = adapter_family(family, lora, config), family.rule(name, config)[0].cut is Cut.ROW
    adapters: dict[str, Adapter] = {}
    for hf in filter(lora.has, rows):
        shapes = (thin.local_shape(adapter_name(hf) + which, config, here) for which in (A, B))
        adapters[hf] = Adapter(*shapes, lora.scale_of(hf), by_columns, linear.weight, layout.sequence_parallel)
        tree.add(adapter_name(hf).removeprefix(ROOT), adapters[hf])
    if by_columns:
        (adapter,) = adapters.values()
        tree.join(linear, _CutByColumns(adapter, layout))
        return
    order = list(adapters)
    begins = {hf: min(first for first, _, _ in runs) for hf, runs in rows.items()}
    parts = [
        (at, order.index(hf) if hf in adapters else None, first - begins[hf], count)
        for hf, runs in rows.items()
        for first, at, count in runs
    ]
    tree.join(linear, _CutByRows(tuple(adapters.values()), tuple(part[1:] for part in sorted(parts)), layout))


@torch.no_grad()
def draw(chunks: Sequence[nn.Module], lora: LoraSettings, family: Family, config: Config, here: Topology, seed: int) -> None:
    """Fills adapters as PEFT does, alike under every layout: A from U(-1/sqrt(in), 1/sqrt(in)) for whole matrices, B with 0.

    Arguments are those of `attach`.
    """
    thin = adapter_family(family, lora, config)
    shapes = thin.hf_shapes(config)
    for name, parameter in (each for chunk in chunks for each in exportable(chunk, adapters=True)):
        if not name.startswith(ROOT):
            continue
        for piece in thin.pieces(name, config, here):
            if name.endswith(B):
                parameter.zero_()
                continue
            rank, into = shapes[piece.hf_name]
            whole = (torch.rand(rank, into, generator=_generator(seed, piece.hf_name)) * 2 - 1) / math.sqrt(into)
            parameter[piece.local_box.slices].copy_(whole[piece.hf_box.slices])


def _generator(seed: int, name: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
