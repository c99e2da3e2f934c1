"""Writing megatron-core's distributed checkpoint so that a failing disk ends the save on every rank.

megatron-core's own `save` writes from helper processes, which outlive a rank that is killed, and leaves the ranks in different
collectives when one of them cannot write. The format is its own; the writing is torch's, in the rank itself, whose every step
reports failures to all.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.mapping import ShardedBase, ShardedTensor
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies.common import TorchCommonSaveStrategy
from megatron.core.dist_checkpointing.strategies.torch import (
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from torch.distributed import checkpoint as torch_checkpoint
from torch.distributed.checkpoint.planner import SavePlan
from torch.distributed.checkpoint.storage import WriteResult

from tulu_mega.distributed.collectives import gathered, root, together
from tulu_mega.layout.optimizer_state import PIECE
from tulu_mega.train.checkpoint_files import HashingFiles
from tulu_mega.train.save_copies import CopiesPlanner, copy


class ShardedSave:
    """A save in three parts, so that the slow one, :meth:`write`, may run in a thread while training goes on.

    `dist_checkpointing.load` reads what comes out. Constructing and :meth:`finish` are collective.

    Args:
        state: megatron-core's, with ShardedTensors and ShardedObjects in it.
        directory: empty.
        what: begins the message of a failure.
        copied: whether tensors may change before they are written; then copies in main memory are taken.

    Raises:
        UserError: on every rank, when any fails.
    """

    def __init__(self, state: dict[str, Any], directory: Path, what: str, copied: bool = False):
        self._directory, self._what = directory, what
        self.digests: dict[str, str] = {}
        """by file of any rank, after :meth:`finish`"""
        self._results: list[WriteResult] = []
        sharded, common = save_preprocess(state)
        with together(what):
            TorchCommonSaveStrategy("torch", 1).save_common(common, str(directory))  # rank 0 writes
        lead = dist.get_rank() == 0
        self._writer = _Writer(directory)
        plans: list[SavePlan] = [SavePlan([])] * dist.get_world_size()
        with together(what):
            named, _flat, _renamed = _replace_state_dict_keys_with_sharded_keys(sharded, keep_only_main_replica=True)
            tensors = [each for parts in named.values() for each in parts if isinstance(each, ShardedTensor)]
            self._planner = CopiesPlanner(copy(tensors) if copied else {})
            pieces = {key: [piece for part in parts for piece in _pieces(part)] for key, parts in named.items()}
            self._planner.set_up_planner(_torch_state(pieces), self._writer.storage_meta(), lead)
            self._writer.set_up_storage_writer(lead)
            plans[dist.get_rank()] = self._writer.prepare_local_plan(self._planner.create_local_plan())
        dist.all_gather_object(plans, plans[dist.get_rank()])
        # every rank makes the whole plan, the same everywhere, and takes its own part of it
        with together(what):
            plans, self._metadata = self._planner.create_global_plan(plans)
            mine = self._writer.prepare_global_plan(plans)[dist.get_rank()]
            self._plan = self._planner.finish_plan(mine)

    def write(self) -> None:
        """Writes this rank's files; they are on the disk when this returns. Not collective.

        Raises:
            Exception: what the disk says; hand it to :meth:`finish`.
        """
        self._results = self._writer.write_data(self._plan, self._planner).wait()
        self._planner = self._plan = None  # copies are freed

    def finish(self, failure: BaseException | None) -> None:
        """Makes the files a checkpoint.

        Args:
            failure: what `write` raised on this rank, if it did.

        Raises:
            UserError: on every rank, when any failed.
        """
        with together(self._what):
            if failure is not None:
                raise failure
        written = gathered((self._results, self._writer.fs.digests))
        for _, taken in written:
            self.digests |= taken
        with together(self._what):
            if dist.get_rank() == 0:
                self._writer.finish(self._metadata, [results for results, _ in written])
                save_config(CheckpointingConfig("torch_dist", 1), str(self._directory))


def _pieces(part: ShardedBase) -> list[ShardedBase]:
    """A large box of the optimizer's state in even parts, as which it passes through main memory on its way from a GPU, and when
    it is read again."""
    if not isinstance(part, ShardedTensor) or part.has_regular_grid or part.data.numel() <= PIECE:
        return [part]
    axis = next(at for at, size in enumerate(part.local_shape) if size > 1)
    size = part.local_shape[axis]
    step = math.ceil(size / math.ceil(part.data.numel() / PIECE))
    pieces = []
    for start in range(0, size, step):
        data = part.data.narrow(axis, start, min(step, size - start))
        offset = tuple(corner + start * (at == axis) for at, corner in enumerate(part.global_offset))
        pieces.append(replace(part, data=data, local_shape=tuple(data.shape), global_offset=offset))
    return pieces


def _torch_state(named: dict[str, list[ShardedBase]]) -> dict[str, Any]:
    """What this rank is to write, in torch's terms."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # megatron-core's tensors are torch's older kind
        return mcore_to_pyt_state_dict(named, False)


class _Writer(torch_checkpoint.FileSystemWriter):
    """Takes digests, and tells what went wrong: torch's serialiser stumbles over its own tidying up after the disk's error."""

    def __init__(self, directory: Path):
        super().__init__(directory, sync_files=True, per_thread_copy_ahead=0)
        self.fs = HashingFiles()

    def write_data(self, plan, planner):
        try:
            return super().write_data(plan, planner)
        except Exception as error:  # pickled on its way to the other ranks, it would lose what led to it
            raise root(error) from None
