"""Weights between Hugging Face directories and the shards of a running Megatron model."""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tulu_mega.bridge.files.companions import OtherTokenizer, put_in_place, write_companions
from tulu_mega.bridge.files.hf_files import HfCheckpoint, TensorInfo
from tulu_mega.bridge.files.hf_writer import ShardWriter, plan_files, write_index
from tulu_mega.bridge.files.peft import write_adapters
from tulu_mega.bridge.fp8 import unrounded
from tulu_mega.bridge.rules import Piece
from tulu_mega.bridge.shards import ModelShard, Outbound, announced, copy_in_slabs, exportable, gather, outbound, send
from tulu_mega.distributed.collectives import together
from tulu_mega.errors import UserError


@torch.no_grad()
def load_hf(shard: ModelShard, checkpoint: HfCheckpoint, leave: Collection[str] = ()) -> int:
    """Fill every parameter of this rank's chunks from the mapped files, converted to the parameter's type.

    Only this rank's boxes are read, in slabs, so that nothing but the parameters themselves takes memory.
    Rows of vocabulary padding become zero. Works on any device.

    Args:
        shard: its config and family are the files', which may be those of a language model where the shard is a reward model's.
        leave: parameters that stay as they are.

    Returns:
        Bytes read.

    Raises:
        UserError: with everything that does not fit, before anything is written.
    """
    family, config, grid = shard.family, shard.config, shard.grid
    problems = checkpoint.check(family.hf_shapes(config), family.ignorable(config))
    plan: list[tuple[Tensor, list[Piece]]] = []
    for name, parameter in (each for chunk in shard.chunks for each in exportable(chunk, family.adapters)):
        if name in leave:
            continue
        try:
            shape = family.local_shape(name, config, grid)
            plan.append((parameter, family.pieces(name, config, grid)))
        except UserError as error:
            problems += error.problems
            continue
        if tuple(parameter.shape) != shape:
            held, wanted = list(parameter.shape), list(shape)
            problems.append(f"{name}: the model's shard is {held}, {checkpoint.asks} and TP {grid.tensor} ask for {wanted}")
    if problems:
        raise UserError(problems)
    nbytes = 0
    for parameter, pieces in plan:
        with unrounded(parameter) as whole:
            for piece in pieces:
                view = checkpoint.read_box(piece.hf_name, piece.hf_box)
                copy_in_slabs(whole[piece.local_box.slices], view)
                nbytes += view.nbytes
            filled = max((piece.local_box[0][1] for piece in pieces), default=0)
            whole[filled:].zero_()
    return nbytes


@torch.no_grad()
def export_hf(
    shard: ModelShard,
    directory: str | os.PathLike,
    dtype: torch.dtype,
    source_directory: str | os.PathLike,
    extra_files: Mapping[str, str] | None = None,
    tokenizer: OtherTokenizer | None = None,
    ends: Sequence[int] = (),
    max_shard_bytes: int = 5 * 2**30,
) -> None:
    """Write the model as a Hugging Face directory that transformers and vLLM load. Every rank of the world calls it.

    Each pipeline stage's TP rank 0 gathers and writes the stage's layers tensor by tensor (about one full tensor of memory) into
    a hidden directory beside the final one, which takes its name only when everything is in it and on disk.

    Args:
        shard: this rank's part of the model, with its groups. Ranks that hold copies only wait (`ShardGrid.first_copy`).
        directory: the final directory; a model directory of that name is replaced.
        dtype: type of the written weights (float32 or bfloat16).
        source_directory: where the tokenizer, its chat template and the generation config are copied from.
        extra_files, tokenizer, ends: what goes beside the weights, see `write_companions`.
        max_shard_bytes: bytes of weights a file holds at most.

    Raises:
        UserError: on every rank: before anything is written, when the place cannot be used; or when a rank cannot write, e.g.
            on a full disk. What was in the directory before is untouched then.
    """
    final, source = Path(directory).absolute(), Path(source_directory).absolute()
    _check_place(final, source)
    partial = final.with_name(f".{final.name}.partial")
    what = f"the model could not be written to {final}"
    grid = shard.grid
    is_first = grid.gives_whole_tensors and grid.pipeline_rank == 0
    with together(what):
        if is_first:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
    try:
        with together(what):
            if grid.first_copy:
                items = outbound(shard)
                stages = announced(items, shard, dtype)
                files = plan_files(stages, max_shard_bytes)
                if grid.gives_whole_tensors:
                    at = grid.pipeline_rank
                    _write_stage(ShardWriter(partial, files[at]), items, stages[at], dtype, shard)
                else:
                    for item in items:
                        send([item], dtype, shard)
        with together(what):
            if is_first:
                write_index(partial, files)
                write_companions(partial, source, shard.config, str(dtype).removeprefix("torch."), extra_files, tokenizer, ends)
                put_in_place(partial, final)
    except UserError:
        if is_first:
            shutil.rmtree(partial, ignore_errors=True)
        dist.barrier()
        raise


@torch.no_grad()
def export_adapters(shard: ModelShard, directory: str | os.PathLike, dtype: torch.dtype, config: Mapping[str, Any]) -> None:
    """Writes low-rank adapters as PEFT does, in one file, which the first stage's first rank gathers. Every rank calls it.

    Args:
        shard: of the family of the adapters (`bridge.adapters`).
        directory: the final directory; one of adapters is replaced.
        dtype: of what is written.
        config: content of adapter_config.json.

    Raises:
        UserError: on every rank, when the place cannot be used or written; what was there before is untouched then.
    """
    final = Path(directory).absolute()
    grid = shard.grid
    with together(f"the adapters could not be written to {final}"):
        if grid.first_copy:
            mine = _gathered(outbound(shard), dtype, shard)
            stages = [mine]
            if grid.gives_whole_tensors and grid.pipeline > 1:
                first = grid.pipeline_rank == 0
                stages = [None] * grid.pipeline if first else None
                dist.gather_object(mine, stages, group=shard.pipeline_group, group_dst=0)
            if grid.gives_whole_tensors and grid.pipeline_rank == 0:
                write_adapters(final, {name: each for stage in stages for name, each in stage.items()}, config)


def _gathered(items: Sequence[Outbound], dtype: torch.dtype, shard: ModelShard) -> dict[str, Tensor]:
    """On TP rank 0: the stage's whole tensors, by name."""
    shapes = shard.family.hf_shapes(shard.config)
    wholes = {}
    for item in items:
        if shard.grid.gives_whole_tensors:
            wholes[item.hf_name] = torch.empty(shapes[item.hf_name], dtype=dtype)
            gather([item], [wholes[item.hf_name]], shard)
        else:
            send([item], dtype, shard)
    return wholes


def _write_stage(
    writer: ShardWriter,
    items: Sequence[Outbound],
    tensors: Mapping[str, TensorInfo],
    dtype: torch.dtype,
    shard: ModelShard,
) -> None:
    """Gather and write the stage, on TP rank 0. After a failure it still receives the tensors that the other ranks send."""
    failure: OSError | None = None
    with writer:
        for item in items:
            full = torch.empty(tensors[item.hf_name].shape, dtype=dtype)
            gather([item], [full], shard)
            if failure is None:
                try:
                    writer.add(item.hf_name, full)
                except OSError as error:
                    failure = error
        if failure:
            raise failure


def _check_place(final: Path, source: Path) -> None:
    problems = []
    if final == source:
        problems.append(f"{final}: is the directory of the model that this run started from; export to another one")
    elif final.exists() and not (final.is_dir() and ((final / "config.json").exists() or not any(final.iterdir()))):
        problems.append(f"{final}: exists and is no model directory, so it is not replaced; choose another name")
    if not source.is_dir():
        problems.append(f"{source}: no such directory; expected the model whose tokenizer files are to be copied")
    if problems:
        raise UserError(problems)
