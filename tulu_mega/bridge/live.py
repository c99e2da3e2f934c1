"""Weights between Hugging Face directories and the shards of a running Megatron model.

A chunk is one virtual pipeline stage's unwrapped GPTModel: of it this file uses ``named_parameters()`` and
``decoder.layers[k].layer_number`` (from 1, in the whole model) and nothing else.
"""

from __future__ import annotations

import itertools
import math
import os
import shutil
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tulu_kernels.buckets import BoxCopies
from tulu_kernels.dispatch import Backend

from tulu_mega.bridge import fp8_blocks
from tulu_mega.bridge.companions import put_in_place, write_companions
from tulu_mega.bridge.hf_files import HfCheckpoint, TensorInfo
from tulu_mega.bridge.hf_writer import ShardWriter, plan_files, tensor_info, write_index
from tulu_mega.bridge.rules import Config, Family, Piece, Region, is_weight
from tulu_mega.collective import together
from tulu_mega.errors import UserError

_SLAB_BYTES = 32 * 2**20


def global_parameters(chunk: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The chunk's weights under the names they have in the whole model: local layer numbers become global ones."""
    prefix = "decoder.layers."
    for name, parameter in chunk.named_parameters():
        if name.startswith(prefix):
            local, rest = name[len(prefix) :].split(".", 1)
            name = f"{prefix}{chunk.decoder.layers[int(local)].layer_number - 1}.{rest}"
        if is_weight(name):
            yield name, parameter


@torch.no_grad()
def load_hf(
    chunk: nn.Module, checkpoint: HfCheckpoint, family: Family, tp_rank: int, tp_size: int, leave: Collection[str] = ()
) -> int:
    """Fills every parameter of this rank's chunk from the mapped files, converting to the parameter's type.

    Only this rank's boxes are read, in slabs, so that nothing but the parameters themselves takes memory.
    Rows of vocabulary padding become zero. Works on any device.

    Args:
        leave: parameters that stay as they are.

    Returns:
        Bytes read.

    Raises:
        UserError: with everything that does not fit, before anything is written.
    """
    problems = checkpoint.check(family.hf_shapes(checkpoint.config), family.ignorable(checkpoint.config))
    plan: list[tuple[Tensor, list[Piece]]] = []
    for name, parameter in global_parameters(chunk):
        if name in leave:
            continue
        try:
            shape = family.local_shape(name, tp_size, checkpoint.config)
            plan.append((parameter, family.pieces(name, tp_rank, tp_size, checkpoint.config)))
        except UserError as error:
            problems += error.problems
            continue
        if tuple(parameter.shape) != shape:
            problems.append(
                f"{name}: the model's shard is {list(parameter.shape)}, config.json and TP {tp_size} ask for {list(shape)}"
            )
    if problems:
        raise UserError(problems)
    nbytes = 0
    for parameter, pieces in plan:
        for piece in pieces:
            view = checkpoint.read_region(piece.hf_name, piece.hf_region)
            _copy_in_slabs(_box(parameter, piece.local_region), view)
            nbytes += view.nbytes
        filled = max((piece.local_region[0][1] for piece in pieces), default=0)
        parameter[filled:].zero_()
    return nbytes


def _box(tensor: Tensor, region: Region) -> Tensor:
    return tensor[tuple(slice(start, stop) for start, stop in region)]


def _copy_in_slabs(target: Tensor, source: Tensor) -> None:
    """A copy whose temporaries (another device, another type) stay small whatever the size of the tensor."""
    rows = max(1, _SLAB_BYTES // max(1, source[0].nbytes)) if len(source) else 1
    for at in range(0, len(source), rows):
        target[at : at + rows].copy_(source[at : at + rows])


@dataclass(frozen=True)
class _Item:
    """A Hugging Face tensor on its way out: who holds which boxes of it."""

    hf_name: str
    parameter: Tensor
    pieces: tuple[tuple[Piece, ...], ...]
    """per TP rank; of a replicated tensor only rank 0's"""


@torch.no_grad()
def export_hf(
    chunks: Sequence[nn.Module],
    directory: str | os.PathLike,
    config: Config,
    family: Family,
    *,
    tp_group: dist.ProcessGroup | None,
    tp_rank: int,
    tp_size: int,
    pp_group: dist.ProcessGroup | None,
    pp_rank: int,
    pp_size: int,
    is_writer: bool,
    dtype: torch.dtype,
    source_directory: str | os.PathLike,
    extra_files: Mapping[str, str] | None = None,
    max_shard_bytes: int = 5 * 2**30,
) -> None:
    """Writes the model as a Hugging Face directory that transformers and vLLM load. Every rank of the world calls it.

    Each pipeline stage's TP rank 0 gathers and writes the stage's layers tensor by tensor (about one full tensor of memory) into
    a hidden directory beside the final one, which takes its name only when everything is in it and on disk.

    Args:
        chunks: this rank's model chunks, unwrapped.
        directory: the final directory; a model directory of that name is replaced.
        config: the model's config.json.
        family: its family.
        tp_group, pp_group: may be None for a size of 1.
        is_writer: data parallel rank 0 and context parallel rank 0; the other ranks only wait.
        dtype: type of the written weights (float32 or bfloat16).
        source_directory: where the tokenizer, its chat template and the generation config are copied from.
        extra_files: name -> text of files that are written beside or instead of the copied ones.
        max_shard_bytes: bytes of weights a file holds at most.

    Raises:
        UserError: on every rank: before anything is written, when the place cannot be used; or when a rank cannot write, e.g.
            on a full disk. What was in the directory before is untouched then.
    """
    final, source = Path(directory).absolute(), Path(source_directory).absolute()
    _check_place(final, source)
    partial = final.with_name(f".{final.name}.partial")
    what = f"the model could not be written to {final}"
    is_first = is_writer and tp_rank == 0 and pp_rank == 0
    with together(what):
        if is_first:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
    try:
        with together(what):
            if is_writer:
                items = _plan_export(chunks, family, config, tp_size)
                tensors = _announced(items, family, config, dtype)
                stages: list[dict[str, TensorInfo]] = [tensors]
                if pp_size > 1:
                    stages = [{} for _ in range(pp_size)]
                    dist.all_gather_object(stages, tensors, group=pp_group)
                _check_complete(stages, family, config)
                files = plan_files(stages, max_shard_bytes)
                if tp_rank == 0:
                    _write_stage(ShardWriter(partial, files[pp_rank]), items, tensors, dtype, tp_group)
                else:
                    for item in items:
                        _send([item], dtype, tp_group, tp_rank)
        with together(what):
            if is_first:
                write_index(partial, files)
                write_companions(partial, source, config, str(dtype).removeprefix("torch."), extra_files)
                put_in_place(partial, final)
    except UserError:
        if is_first:
            shutil.rmtree(partial, ignore_errors=True)
        dist.barrier()
        raise


def _write_stage(
    writer: ShardWriter,
    items: Sequence[_Item],
    tensors: Mapping[str, TensorInfo],
    dtype: torch.dtype,
    tp_group: dist.ProcessGroup | None,
) -> None:
    """On TP rank 0: gathers and writes the stage. After a failure the other ranks' tensors are still received: they send them."""
    failure: OSError | None = None
    with writer:
        for item in items:
            full = torch.empty(tensors[item.hf_name].shape, dtype=dtype)
            _gather([item], [full], tp_group)
            if failure is None:
                try:
                    writer.add(item.hf_name, full)
                except OSError as error:
                    failure = error
        if failure:
            raise failure


def _plan_export(chunks: Sequence[nn.Module], family: Family, config: Config, tp_size: int) -> list[_Item]:
    """This stage's tensors in one order on every TP rank."""
    items = []
    for chunk in chunks:
        for name, parameter in global_parameters(chunk):
            per_rank = [family.pieces(name, rank, tp_size, config) for rank in range(tp_size)]
            if any(piece.duplicate for pieces in per_rank for piece in pieces):
                continue
            if per_rank == [per_rank[0]] * tp_size:  # replicated
                per_rank = per_rank[:1]
            for hf_name in dict.fromkeys(piece.hf_name for pieces in per_rank for piece in pieces):
                chosen = tuple(tuple(piece for piece in pieces if piece.hf_name == hf_name) for pieces in per_rank)
                items.append(_Item(hf_name, parameter, chosen))
    return items


def _announced(items: Sequence[_Item], family: Family, config: Config, dtype: torch.dtype) -> dict[str, TensorInfo]:
    shapes = family.hf_shapes(config)
    return {item.hf_name: tensor_info(shapes[item.hf_name], dtype) for item in items}


def _check_complete(stages: Sequence[Mapping[str, TensorInfo]], family: Family, config: Config) -> None:
    held = Counter(name for stage in stages for name in stage)
    missing = sorted(family.hf_shapes(config).keys() - held.keys())
    twice = sorted(name for name, count in held.items() if count > 1)
    if missing or twice:
        raise RuntimeError(f"the pipeline stages do not make up the model: missing {missing}, held twice {twice}")


Copies = Callable[[int, Sequence[Tensor], Sequence[Tensor]], None]
"""Copies boxes, which a tensor rank holds, to boxes."""


def _copy_each(_rank: int, sources: Sequence[Tensor], targets: Sequence[Tensor]) -> None:
    for source, target in zip(sources, targets, strict=True):
        _copy_in_slabs(target, source)


def _gather(
    items: Sequence[_Item], wholes: Sequence[Tensor], tp_group: dist.ProcessGroup | None, copies: Copies = _copy_each
) -> None:
    """On TP rank 0: fills whole tensors, on whichever device they are, from the boxes of all ranks, one rank's at a time."""
    for rank in range(max(len(item.pieces) for item in items)):
        boxes = _boxes(items, rank)
        targets = [_box(wholes[at], piece.hf_region) for at, piece in boxes]
        if rank == 0:
            copies(rank, [_box(items[at].parameter, piece.local_region) for at, piece in boxes], targets)
        elif boxes:
            received = torch.empty(_size(boxes), dtype=wholes[0].dtype, device=items[0].parameter.device)
            dist.recv(received, group=tp_group, group_src=rank)
            copies(rank, _side_by_side(received, boxes), targets)


def _send(
    items: Sequence[_Item], dtype: torch.dtype, tp_group: dist.ProcessGroup | None, tp_rank: int, copies: Copies = _copy_each
) -> None:
    """On the other TP ranks: this rank's boxes to rank 0, in one message."""
    if boxes := _boxes(items, tp_rank):
        message = torch.empty(_size(boxes), dtype=dtype, device=items[0].parameter.device)
        own = [_box(items[at].parameter, piece.local_region) for at, piece in boxes]
        copies(tp_rank, own, _side_by_side(message, boxes))
        dist.send(message, group=tp_group, group_dst=0)


def _boxes(items: Sequence[_Item], rank: int) -> list[tuple[int, Piece]]:
    """What a TP rank holds of some tensors: the tensor's place among them, and the box."""
    return [(at, piece) for at, item in enumerate(items) if rank < len(item.pieces) for piece in item.pieces[rank]]


def _size(boxes: Sequence[tuple[int, Piece]]) -> int:
    return sum(_volume(piece.hf_region) for _, piece in boxes)


def _side_by_side(message: Tensor, boxes: Sequence[tuple[int, Piece]]) -> list[Tensor]:
    """The boxes in a message."""
    regions = [piece.hf_region for _, piece in boxes]
    parts = message.split([_volume(region) for region in regions])
    return [part.view([stop - start for start, stop in region]) for part, region in zip(parts, regions, strict=True)]


@dataclass(frozen=True)
class WeightMeta:
    """What a tensor is on its way out: vLLM's ``ParamMeta`` in structure."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Outgoing:
    """A whole tensor that a pipeline stage would send, known without sending."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    sent: tuple[int, ...]
    """bytes that each tensor rank has of it to give, of a replicated tensor the first alone; scales go with their matrix"""


def outgoing(
    chunks: Sequence[nn.Module], config: Config, family: Family, tp_size: int, dtype: torch.dtype, fp8: bool = False
) -> dict[str, Outgoing]:
    """What `LiveWeights` of these chunks' stage yields, in its order. No collective: the chunks may lie on the meta device.

    Args:
        chunks: a rank's model chunks, unwrapped.
        dtype, fp8: as of `LiveWeights`.
    """
    shapes = family.hf_shapes(config)
    items = sorted(_plan_export(chunks, family, config, tp_size), key=lambda item: _layer(item.hf_name, family))
    found = {}
    for item in items:
        name, shape = item.hf_name, shapes[item.hf_name]
        volumes = [sum(_volume(piece.hf_region) for piece in pieces) for pieces in item.pieces]
        if fp8 and fp8_blocks.is_quantized(name):
            plans = fp8_blocks.shard_plans(name, shape, item.pieces)
            itemsize = item.parameter.itemsize
            sent = map(fp8_blocks.message_bytes, plans) if plans else (volume * itemsize for volume in volumes)
            found[name] = Outgoing(fp8_blocks.NUMBERS, shape, tuple(sent))
            found[fp8_blocks.scales_name(name)] = Outgoing(fp8_blocks.SCALES, fp8_blocks.scales_shape(shape), (0,))
        else:
            found[name] = Outgoing(dtype, shape, tuple(volume * dtype.itemsize for volume in volumes))
    return found


def _volume(region: Region) -> int:
    return math.prod(stop - start for start, stop in region)


class LiveWeights:
    """A running model as a stream of whole Hugging Face tensors, stage by stage at once: vLLM's ``WeightSource`` in structure.

    Every rank of one replica (data and context parallel rank 0) has one, and all of a tensor parallel group walk through it
    together: rank 0 gathers, the others send. Importing vLLM's own base class would cost every trainer rank seconds and some
    270 MB; `rollout.vllm_trainer` has the true subclass.

    Args:
        chunks: this rank's model chunks, unwrapped; read anew in each pass.
        config: the model's config.json.
        family: its family.
        dtype: of the stream, bfloat16 or float32, whatever the model's.
        fp8: whether matrices of the layers travel as FP8 blocks, each as two tensors, the scales right behind the numbers
            (`bridge.fp8_blocks`); made of the model's weights as they are.
        tp_group, pp_group: may be None for a size of 1. Building it is a collective of the pipeline group.
        kernels: what fills tensors together, see `tulu_kernels.dispatch`.
    """

    def __init__(
        self,
        chunks: Sequence[nn.Module],
        config: Config,
        family: Family,
        dtype: torch.dtype,
        *,
        fp8: bool = False,
        tp_group: dist.ProcessGroup | None = None,
        tp_rank: int = 0,
        tp_size: int = 1,
        pp_group: dist.ProcessGroup | None = None,
        pp_rank: int = 0,
        pp_size: int = 1,
        kernels: Backend = "auto",
    ):
        self._dtype, self._tp_group, self._tp_rank = dtype, tp_group, tp_rank
        self._items = _plan_export(chunks, family, config, tp_size)
        mine = _announced(self._items, family, config, dtype)
        stages = [mine]
        if pp_size > 1:
            stages = [{} for _ in range(pp_size)]
            dist.all_gather_object(stages, mine, group=pp_group)
        _check_complete(stages, family, config)
        shapes = {name: info.shape for tensors in stages for name, info in tensors.items()}
        order = sorted(shapes, key=lambda name: _layer(name, family))
        place = {name: at for at, name in enumerate(order)}
        self._items.sort(key=lambda item: place[item.hf_name])
        self._metadata: dict[str, WeightMeta] = {}
        self.stage_of: dict[str, int] = {}
        """pipeline stage that sends each tensor"""
        stage_of = {name: stage for stage, tensors in enumerate(stages) for name in tensors}
        self._tensors = {name: _tensors(name, shapes[name], dtype, fp8) for name in order}
        """of each of the model's, those that travel"""
        for name, tensors in self._tensors.items():
            for meta in tensors:
                self._metadata[meta.name], self.stage_of[meta.name] = meta, stage_of[name]
        self._scales: dict[str, Tensor | None] = {}
        """of matrices that were quantized, until they are asked for"""
        self._kernels = kernels
        self._planned: dict[tuple[str, ...], dict[int, BoxCopies]] = {}
        """of tensors that are filled together, by rank that holds the boxes"""

    def metadata(self) -> list[WeightMeta]:
        """Every tensor of the whole model: embedding, layers in order, the rest; the same on all ranks."""
        return list(self._metadata.values())

    def held_names(self) -> list[str]:
        """The tensors that this stage yields, in their order."""
        return [meta.name for item in self._items for meta in self._tensors[item.hf_name]]

    def groups(self) -> list[list[str]]:
        """The same, a group for each layer; what comes before and after the layers is a group each."""
        return [list(names) for _, names in itertools.groupby(self.held_names(), key=_number)]

    def __iter__(self) -> Iterator[tuple[str, Tensor | None]]:
        """A fresh pass: name and whole tensor, in new memory on the CPU; None for the tensor on all TP ranks but the first."""
        for name in self.held_names():
            meta = self._metadata[name]
            whole = torch.empty(meta.shape, dtype=meta.dtype) if self._tp_rank == 0 else None
            self.fill(name, whole)
            yield name, whole

    def iter_groups(self) -> Iterator[tuple[list[str], list[Tensor | None]]]:
        """The same, a batch for each of `groups`."""
        pairs = iter(self)
        for names in self.groups():
            yield names, [next(pairs)[1] for _ in names]

    def fill(self, name: str, whole: Tensor | None) -> None:
        """Writes one of this stage's tensors into memory that is there. All TP ranks call it, for one tensor after the other;
        scales after their matrix.

        Args:
            whole: on TP rank 0, of the tensor's shape and type (`metadata`), on any device.
        """
        if name in self._by_name:
            item = self._by_name[name]
            if len(self._tensors[name]) > 1:
                self._pass_blocks(item, whole)
            else:
                self._pass([item], [whole])
            return
        scales = self._scales.pop(name)
        if scales is not None:
            whole.copy_(scales)

    def fill_together(self, names: Sequence[str], wholes: Sequence[Tensor | None]) -> None:
        """The same for tensors that lie on the parameters' device, with one message a rank and, on a GPU, a few launches.

        What travels as FP8 blocks goes one after the other.

        Args:
            names: some of `held_names`. The same ones are copied as was planned the first time, as long as nothing moved.
        """
        pairs = list(zip(names, wholes, strict=True))
        plain = [pair for pair in pairs if len(self._tensors.get(pair[0], ())) == 1]
        if plain:
            planned = self._planned.setdefault(tuple(name for name, _ in plain), defaultdict(partial(BoxCopies, self._kernels)))
            items, whole = [self._by_name[name] for name, _ in plain], [whole for _, whole in plain]
            self._pass(items, whole, lambda rank, sources, targets: planned[rank](sources, targets))
        for name, whole in pairs:
            if len(self._tensors.get(name, ())) != 1:
                self.fill(name, whole)

    @cached_property
    def _by_name(self) -> dict[str, _Item]:
        return {item.hf_name: item for item in self._items}

    @torch.no_grad()
    def _pass(self, items: Sequence[_Item], wholes: Sequence[Tensor | None], copies: Copies = _copy_each) -> None:
        if self._tp_rank == 0:
            _gather(items, wholes, self._tp_group, copies)
        else:
            _send(items, self._dtype, self._tp_group, self._tp_rank, copies)

    @torch.no_grad()
    def _pass_blocks(self, item: _Item, numbers: Tensor | None) -> None:
        """A matrix's numbers; its scales are kept for the next call."""
        of_numbers, of_scales = self._tensors[item.hf_name]
        plans = fp8_blocks.shard_plans(item.hf_name, of_numbers.shape, item.pieces)
        scales = None
        if self._tp_rank:
            if plans:
                fp8_blocks.send(item.parameter, plans, self._tp_group, self._tp_rank)
            else:
                _send([item], item.parameter.dtype, self._tp_group, self._tp_rank)
        else:
            scales = torch.empty(of_scales.shape, dtype=of_scales.dtype, device=item.parameter.device)
            if plans:
                fp8_blocks.gather(item.parameter, plans, numbers, scales, self._tp_group)
            else:
                whole = torch.empty(of_numbers.shape, dtype=item.parameter.dtype, device=item.parameter.device)
                _gather([item], [whole], self._tp_group)
                fp8_blocks.quantize_whole(whole, numbers, scales)
        self._scales[of_scales.name] = scales


def _tensors(name: str, shape: tuple[int, ...], dtype: torch.dtype, fp8: bool) -> list[WeightMeta]:
    """One of the model's tensors as it travels."""
    if not (fp8 and fp8_blocks.is_quantized(name)):
        return [WeightMeta(name, dtype, shape)]
    scales = WeightMeta(fp8_blocks.scales_name(name), fp8_blocks.SCALES, fp8_blocks.scales_shape(shape))
    return [WeightMeta(name, fp8_blocks.NUMBERS, shape), scales]


def _number(hf_name: str) -> tuple[str, ...]:
    """What a tensor's group goes by: all before its layer's number, and that."""
    parts = hf_name.split(".")
    found = next((at for at, part in enumerate(parts) if part.isdigit()), None)
    return () if found is None else tuple(parts[: found + 1])


def _layer(hf_name: str, family: Family) -> float:
    """Where a tensor comes in the stream."""
    if number := _number(hf_name):
        return int(number[-1])
    return -1 if hf_name == family.embedding else math.inf


def _check_place(final: Path, source: Path) -> None:
    problems = []
    if final == source:
        problems.append(f"{final}: is the model this run started from; export to another directory")
    elif final.exists() and not (final.is_dir() and ((final / "config.json").exists() or not any(final.iterdir()))):
        problems.append(f"{final}: exists and is no model directory; it is not replaced, choose another name")
    if not source.is_dir():
        problems.append(f"{source}: no such directory; expected the model whose tokenizer files are to be copied")
    if problems:
        raise UserError(problems)
