"""Saving a run's engines as one checkpoint, at once or behind training."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tulu_mega.distributed.collectives import from_lead, together
from tulu_mega.errors import UserError
from tulu_mega.train.checkpoint import Engines, clean, manifest, place, put_in_place, step_name
from tulu_mega.train.engine import Engine
from tulu_mega.train.engine_state import Format, sharded_state
from tulu_mega.train.kept import prune
from tulu_mega.train.save_figures import SaveFigures, SaveWatch
from tulu_mega.train.sharded_save import ShardedSave


class Saver:
    """A run's saves, one at a time. Every rank calls every method, in the same order.

    Asynchronously, a save copies what it will write into main memory and leaves the writing to a thread; the checkpoint has its
    name, and counts, only when every rank has written every engine, which :meth:`poll` finds out. A crash before that leaves the
    one before.

    Args:
        engines: whose states are saved together.
        directory: RUN_DIR/checkpoints, on a file system all ranks share.
        keep: checkpoints that are kept, the newest; see `kept.prune`.
        format: of the optimizers' state.
        asynchronous: whether training goes on while files are written.
        told: is called on rank 0 with what each save took.
        files: gives the content of further small files of a checkpoint by their names; asked on rank 0 in each save.
    """

    def __init__(
        self,
        engines: Engines,
        directory: Path,
        keep: int,
        format: Format,
        asynchronous: bool,
        told: Callable[[SaveFigures], None] = lambda _figures: None,
        files: Callable[[], Mapping[str, bytes]] = dict,
    ):
        self._told, self._files = told, files
        self._engines, self._directory, self._keep, self._format = engines, directory, keep, format
        self._lead = next(iter(engines.values()))
        device = self._lead.platform.device  # a new thread's is GPU 0, on which every rank of the machine would take memory
        start = {"initializer": torch.cuda.set_device, "initargs": (device,)} if device.type == "cuda" else {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint", **start) if asynchronous else None
        self._pending: _Pending | None = None

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Saves, or begins to, after the save before has ended.

        Args:
            step: optimizer steps done.
            state: small JSON-able extras.

        Raises:
            UserError: on every rank, when this save (or, asynchronously, the one before) fails; earlier ones are untouched.
        """
        self.finish()
        self._lead.at("checkpoint")
        watch = SaveWatch()
        with watch.waiting():
            self._pending = self._begun(step, state, watch)
        if self._thread:
            self._pending.writing = [self._thread.submit(sharded.write) for sharded in self._pending.saves]
        else:
            self.finish()

    def _begun(self, step: int, state: dict[str, Any], watch: SaveWatch) -> _Pending:
        """Prepares a save; one that is not asynchronous is written. Arguments and errors of `save`."""
        directory = self._directory
        partial_directory = directory / from_lead(f"{step_name(step)}.partial-{uuid.uuid4().hex[:8]}")
        what = f"checkpoint of step {step} could not be written to {directory}"
        finite = all(engine.finite_weights() for engine in self._engines.values())  # the same on every rank
        pending = _Pending(partial_directory, what, manifest(step, state, finite, self._format, self._engines), watch)
        try:
            with together(what):
                if dist.get_rank() == 0:
                    clean(directory)
                    for name in self._engines:
                        place(partial_directory, self._engines, name).mkdir(parents=True, exist_ok=True)
                    for name, content in self._files().items():
                        (partial_directory / name).write_bytes(content)
            for name, engine in self._engines.items():
                sharded = self._sharded(engine, place(partial_directory, self._engines, name), what)
                pending.saves.append(sharded)
                if self._thread is None:
                    _write(sharded)
        except UserError:
            pending.discard()
            raise
        return pending

    def _sharded(self, engine: Engine, directory: Path, what: str) -> ShardedSave:
        content = sharded_state(engine, self._format, loading=False)
        if engine is not self._lead:
            del content["rng"]  # the process has one
        return ShardedSave(content, directory, what, copied=self._thread is not None)

    def _digests(self, pending: _Pending) -> dict[str, str]:
        """Of the files that ranks wrote, by name within the checkpoint."""
        places = (place(pending.partial, self._engines, name).relative_to(pending.partial) for name in self._engines)
        return {
            str(at / name): each
            for at, sharded in zip(places, pending.saves, strict=True)
            for name, each in sharded.digests.items()
        }

    @property
    def writing(self) -> bool:
        """Whether this rank is still writing, behind training."""
        return self._pending is not None and not all(each.done() for each in self._pending.writing)

    def poll(self, writing: bool | None = None) -> None:
        """Ends the save under way if every rank has written; never waits for a disk. Raises as `save`.

        Args:
            writing: whether any rank was still writing when it was last asked, where all know that; None asks them.
        """
        if self._pending and self._pending.writing:
            if writing is None:
                anywhere = torch.tensor(int(self.writing), device=self._lead.platform.device)
                dist.all_reduce(anywhere, dist.ReduceOp.MAX)
                writing = bool(anywhere.item())
            if not writing:
                self.finish()

    def finish(self) -> None:
        """Ends the save under way, if there is one, waiting for every rank. Raises as `save`."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        self._lead.at("checkpoint")
        with pending.watch.waiting():
            self._ended(pending)
        largest = torch.tensor(pending.watch.end(), dtype=torch.float64, device=self._lead.platform.device)
        dist.all_reduce(largest, dist.ReduceOp.MAX)  # nobody goes on before the lead has removed the oldest
        seconds, waited, memory = largest.tolist()
        if dist.get_rank() == 0:
            self._told(SaveFigures(pending.manifest["step"], seconds, waited, int(memory) if memory >= 0 else None))

    def _ended(self, pending: _Pending) -> None:
        """Waits for every rank's files and gives the checkpoint its name. Raises as `save`."""
        failures = [writing.exception() for writing in pending.writing]  # all have ended before any is taken away
        try:
            for sharded, failure in zip(pending.saves, failures, strict=False):
                sharded.finish(failure)
            with together(pending.what):
                if dist.get_rank() == 0:
                    put_in_place(pending.partial, self._directory, pending.manifest, self._digests(pending))
        except UserError:
            pending.discard()
            raise
        if dist.get_rank() == 0:
            prune(self._directory, self._keep, pending.manifest["step"])
        dist.barrier()


@dataclass
class _Pending:
    """A save that has begun."""

    partial: Path
    what: str
    manifest: dict[str, Any]
    watch: SaveWatch
    saves: list[ShardedSave] = field(default_factory=list)
    """one an engine"""
    writing: list[Future[None]] = field(default_factory=list)
    """the end of each save's writing; empty where all are written and finished"""

    def discard(self) -> None:
        """Ends a save that failed and removes what it has written; every rank waits until it is gone."""
        self.watch.end()
        if dist.get_rank() == 0:
            shutil.rmtree(self.partial, ignore_errors=True)
        dist.barrier()


def _write(sharded: ShardedSave) -> None:
    """Writes one engine's files, on every rank. Raises UserError on every rank, when any failed."""
    failure = None
    try:
        sharded.write()
    except Exception as error:
        failure = error
    sharded.finish(failure)
