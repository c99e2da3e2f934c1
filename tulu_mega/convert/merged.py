"""A model with low-rank adapters added to its weights, read as one."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from tulu_mega.bridge.adapters import MAGNITUDE, PEFT_ROOT, A, B, adapter_family
from tulu_mega.bridge.box import Box
from tulu_mega.bridge.files import peft
from tulu_mega.bridge.megatron_keys import Slab
from tulu_mega.bridge.rules import Config, Family
from tulu_mega.convert.sources import Source
from tulu_mega.distributed.grid import ShardGrid
from tulu_mega.errors import UserError

_WEIGHT = ".weight"


class MergedSource:
    """W + scale B A for W, its rows brought to the lengths that DoRA trained: made in float32, rounded once.

    Args:
        source: the model's weights.
        adapter: directory of adapters in PEFT's format.

    Raises:
        UserError: the adapters cannot be read, or are another model's.
    """

    def __init__(self, source: Source, adapter: Path, family: Family, config: Config):
        told, self._files = peft.open_adapter(adapter)
        self._lora, self._source, self._family, self._config = peft.settings_of(adapter), source, family, config
        if told.get("task_type") == "SEQ_CLS" and not family.reward:
            raise UserError(
                f"adapter = {str(adapter)!r}: is a reward model's, the source is a language model; take RUN_DIR/hf of the run "
                "that made it, where it is merged"
            )
        thin = adapter_family(family, self._lora, config)
        if problems := self._files.check(thin.hf_shapes(config)):
            raise UserError([*problems, f"adapter = {str(adapter)!r} does not belong to the source"])
        self.dtype = source.dtype

    def fill(self, slab: Slab, out: Tensor) -> None:
        pieces = self._family.pieces(slab.parameter.name, self._config, ShardGrid())
        if not any(self._changes(piece.hf_name) for piece in pieces):
            self._source.fill(slab, out)
            return
        rows = torch.empty(out.shape, dtype=torch.float32)
        self._source.fill(slab, rows)
        for piece in pieces:
            start, stop = piece.local_box[0]
            low, high = max(start, slab.start), min(stop, slab.stop)
            if low < high and self._changes(piece.hf_name):
                first = piece.hf_box[0][0] + low - start
                self._change(piece.hf_name, rows[low - slab.start : high - slab.start], first)
        out.copy_(rows)

    def tensor(self, name: str, dtype: torch.dtype) -> Tensor:
        if not self._changes(name):
            return self._source.tensor(name, dtype)
        whole = self._source.tensor(name, torch.float32).clone()
        self._change(name, whole, 0)
        return whole.to(dtype)

    def files(self) -> list[Path]:
        return [*self._source.files(), *(self._files.path / name for name in (peft.CONFIG, peft.WEIGHTS))]

    def _changes(self, name: str) -> bool:
        return self._lora.has(name) or PEFT_ROOT + name in self._files.tensors

    def _change(self, name: str, rows: Tensor, first: int) -> None:
        """Makes rows of a matrix those of the merged one; a head that was trained whole takes the place of the model's."""
        if not self._lora.has(name):
            rows.copy_(self._read(PEFT_ROOT + name)[first : first + len(rows)])
            return
        thin = PEFT_ROOT + name.removesuffix(_WEIGHT)
        tall, wide = self._read(f"{thin}{B}{_WEIGHT}"), self._read(f"{thin}{A}{_WEIGHT}")
        rows += self._lora.scale_of(name) * (tall[first : first + len(rows)] @ wide)
        if self._lora.dora:
            rows *= (self._read(thin + MAGNITUDE)[first : first + len(rows)] / torch.linalg.norm(rows, dim=1))[:, None]

    def _read(self, name: str) -> Tensor:
        return self._files.read_box(name, Box.whole(self._files.tensors[name].shape)).float()
