"""Low-rank adapters beside the frozen linear layers of a model (LoRA, Hu et al., arXiv 2106.09685).

One adapter for each Hugging Face matrix, as PEFT has it, also where megatron-core keeps several matrices in one parameter. An
adapter is cut as its matrix is (`bridge.adapters`), so that between tensor ranks nothing wider than the rank is sent. Adapters
lie in a tree of their own under the model, named as PEFT names them; what they make is added to the output of their layer
(`adapter_layers`).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import torch
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor, nn

from tulu_mega.bridge.adapters import MAGNITUDE, ROOT, A, B, adapter_family, adapter_name, rows_of
from tulu_mega.bridge.rules import Config, Cut, Family
from tulu_mega.bridge.shards import exportable, global_name
from tulu_mega.config.lora import LoraSettings
from tulu_mega.distributed.topology import Topology
from tulu_mega.model.adapter_layers import Adapter, CutByColumns, CutByRows, Layout, MergedWeight


class AdapterTree(nn.Module):
    """The tree of a chunk's adapters: ``model.layers.3.self_attn.q_proj.lora_A``, layers numbered in the whole model."""

    def __init__(self) -> None:
        super().__init__()
        self._merged: dict[int, MergedWeight] = {}
        self._beside: list[CutByRows | CutByColumns] = []

    def add(self, path: str, adapter: Adapter) -> None:
        """Puts an adapter at its place."""
        *above, name = path.split(".")
        place: nn.Module = self
        for each in above:
            if each not in dict(place.named_children()):
                place.add_module(each, nn.Module())
            place = place.get_submodule(each)
        place.add_module(name, adapter)

    def join(self, linear: nn.Module, adapters: CutByRows | CutByColumns) -> None:
        """Adds what adapters make to a linear layer's output, from now on."""
        self._merged[id(linear.weight)] = MergedWeight(adapters.weight, adapters)
        self._beside.append(adapters)
        linear.register_forward_hook(adapters)

    def begin_magnitudes(self) -> None:
        """Makes the magnitudes the lengths of the rows that they are for. A collective of the tensor ranks."""
        for each in self._beside:
            if each.magnitudes:
                each.begin()

    def look(self) -> None:
        """Makes what is merged that of the adapters of now. A collective of the tensor ranks."""
        for each in self._merged.values():
            each.look()

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
        layout, thin = Layout(chunk.config.sequence_parallel, here.tensor_group), adapter_family(family, lora, config)
        for name, _weight in list(chunk.named_parameters()):
            if name.endswith(".weight"):
                linear = chunk.get_submodule(name.removesuffix(".weight"))
                _attach(tree, linear, global_name(chunk, name), lora, family, thin, config, here, layout)
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
    thin: Family,
    config: Config,
    here: Topology,
    layout: Layout,
) -> None:
    rows = rows_of(family, name, config, here)
    if not any(map(lora.has, rows)):
        return
    by_columns = family.rule(name, config)[0].cut is Cut.ROW
    adapters: dict[str, Adapter] = {}
    for hf in filter(lora.has, rows):
        shapes = (thin.local_shape(adapter_name(hf) + which, config, here) for which in (A, B))
        adapters[hf] = Adapter(*shapes, lora.scale_of(hf), by_columns, linear.weight, layout.sequence_parallel, lora.dora)
        tree.add(adapter_name(hf).removeprefix(ROOT), adapters[hf])
    if by_columns:
        (adapter,) = adapters.values()
        tree.join(linear, CutByColumns(linear.weight, adapter, layout, lora.dora))
        return
    order = list(adapters)
    begins = {hf: min(first for first, _, _ in runs) for hf, runs in rows.items()}
    parts = [
        (at, order.index(hf) if hf in adapters else None, first - begins[hf], count)
        for hf, runs in rows.items()
        for first, at, count in runs
    ]
    made = tuple(part[1:] for part in sorted(parts))
    tree.join(linear, CutByRows(linear.weight, tuple(adapters.values()), made, layout, lora.dora))


@torch.no_grad()
def draw(chunks: Sequence[nn.Module], lora: LoraSettings, family: Family, config: Config, here: Topology, seed: int) -> None:
    """Fills adapters as PEFT does, alike under every layout: A from U(-1/sqrt(in), 1/sqrt(in)) for whole matrices, B with 0,
    magnitudes with the lengths of the weights' rows.

    Arguments are those of `attach`.
    """
    thin = adapter_family(family, lora, config)
    shapes = thin.hf_shapes(config)
    for name, parameter in (each for chunk in chunks for each in exportable(chunk, adapters=True)):
        if not name.startswith(ROOT) or name.endswith(MAGNITUDE):
            continue
        for piece in thin.pieces(name, config, here):
            if name.endswith(B):
                parameter.zero_()
                continue
            rank, into = shapes[piece.hf_name]
            whole = (torch.rand(rank, into, generator=_generator(seed, piece.hf_name)) * 2 - 1) / math.sqrt(into)
            parameter[piece.local_box.slices].copy_(whole[piece.hf_box.slices])
    for chunk in chunks:
        chunk.adapters.begin_magnitudes()


def _generator(seed: int, name: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
