"""Checkpoints of a run: megatron-core's distributed checkpoint of one or several engines, found again and loaded.

A checkpoint is a directory `step_N`, written by `saver` beside its place and renamed when every byte is on disk, so a crash at
any moment leaves the last good one. The first engine's files lie in the directory itself, those of each further engine in a
directory of its name inside. `training.json` names every file with its size; a directory that does not match is not taken for a
checkpoint. It has each file's digest, too, which is held against the file before it is loaded (`checkpoint_files`).
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tulu_mega.bridge.files.megatron_index import screen
from tulu_mega.bridge.files.untrusted import read_json
from tulu_mega.distributed.collectives import together
from tulu_mega.errors import UserError
from tulu_mega.resilience.skipped_updates import in_streak
from tulu_mega.train.checkpoint_files import MANIFEST, digests
from tulu_mega.train.engine import Engine
from tulu_mega.train.engine_state import Format, cut_of, identity, layout_of, load_parameters, load_state
from tulu_mega.train.random_state import Kept

_NAME = re.compile(r"step_(\d+)")

Engines = Mapping[str, Engine]
"""The engines that are saved and restored together, by name. The first engine's name is not written; the names of the others are
those of their directories. A run has the same engines, in the same order, at every start."""


@dataclass(frozen=True)
class Saved:
    """One engine's part of a checkpoint."""

    path: Path
    """Directory of the engine's files."""
    model: dict[str, Any]
    """Sizes of the model."""
    layout: list[int]
    """Layout under which it was written: TP, PP, VPP, CP, DP."""
    cut: dict[str, Any]
    """what else decides where the optimizer's state lies in a checkpoint of the same layout, by name; empty in those of the first
    version"""


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk."""

    path: Path
    step: int
    """Number of optimizer steps done."""
    state: dict[str, Any]
    """Entries that the recipe stored beside the engines, such as counters."""
    finite: bool
    """whether every weight is a finite number"""
    random: Kept
    """Ranks whose random states are there."""
    format: Format
    """Form of the optimizers' state."""
    first: Saved
    others: dict[str, Saved]
    """further engines by name"""

    @property
    def healthy(self) -> bool:
        """Whether the checkpoint is worth going back to: its weights are finite, and so was the update before it."""
        return self.finite and not in_streak(self.state)


def find(directory: Path) -> list[Checkpoint]:
    """Return the complete checkpoints in a directory, oldest first. Torn, foreign and unfinished directories are passed over."""
    found = []
    for path in sorted(directory.glob("step_*")) if directory.is_dir() else []:
        if not _NAME.fullmatch(path.name):
            continue
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
            manifest = read_json(path / MANIFEST)
            if all((path / name).stat().st_size == size for name, size in manifest["files"].items()):
                others = {name: _saved(path / name, each) for name, each in manifest.get("engines", {}).items()}
                step, state, format = (manifest[name] for name in ("step", "state", "format"))
                finite, random = manifest.get("finite", True), manifest.get("random", "first copy's")  # older ones do not say
                if type(step) is not int or not isinstance(state, dict):
                    continue
                found.append(Checkpoint(path, step, state, finite, random, format, _saved(path, manifest), others))
    return sorted(found, key=lambda checkpoint: checkpoint.step)


def _saved(path: Path, told: Mapping[str, Any]) -> Saved:
    return Saved(path, told["model"], told["layout"], told.get("cut", {}))


def manifest(step: int, state: dict[str, Any], finite: bool, format: Format, engines: Engines) -> dict[str, Any]:
    """Content of `training.json` but for the files."""
    first, *others = engines.values()
    made = {"step": step, "state": state, **_model_and_layout(first), "format": format, "cut": cut_of(first)}
    made |= {"finite": finite, "random": "every rank's"}
    if others:
        names = list(engines)[1:]
        parts = ({**_model_and_layout(engine), "cut": cut_of(engine)} for engine in others)
        made["engines"] = dict(zip(names, parts, strict=True))
    return made


def _model_and_layout(engine: Engine) -> dict[str, Any]:
    return {"model": identity(engine.hf), "layout": layout_of(engine)}


def place(directory: Path, engines: Engines, name: str) -> Path:
    """Directory of an engine's files in the directory of a checkpoint."""
    return directory if name == next(iter(engines)) else directory / name


def put_in_place(partial: Path, directory: Path, content: dict[str, Any], taken: Mapping[str, str]) -> None:
    """Rename a directory that is complete and on disk to its final name.

    Args:
        partial: what was written.
        directory: RUN_DIR/checkpoints.
        content: of `manifest`.
        taken: digests of files as they were written, by name within the directory.
    """
    final = directory / step_name(content["step"])
    files = {str(p.relative_to(partial)): p.stat().st_size for p in partial.rglob("*") if p.is_file()}
    content |= {"files": files, "digests": digests(partial, files, taken)}
    (partial / MANIFEST).write_text(json.dumps(content, indent=1))
    for path in (*partial.rglob("*"), partial):
        _to_disk(path)
    if final.exists():  # a step saved twice, by a run that was put back
        shutil.rmtree(final)
    partial.rename(final)
    _to_disk(final.parent)


def clean(directory: Path) -> None:
    """Remove the remains of unfinished saves."""
    for left in directory.glob("step_*.partial-*"):
        shutil.rmtree(left, ignore_errors=True)


def step_name(step: int) -> str:
    """Name of a checkpoint's directory."""
    return f"step_{step:08d}"


def restore(engines: Engines, checkpoint: Checkpoint) -> None:
    """Loads every engine's parameters and optimizer, and, under the same layout, the random states. Called by every rank, after
    `Engine.prepare_training`.

    Raises:
        UserError: when it is another model's, is of the form of another layout than this run's, has other engines, or cannot be
            read.
    """
    first, *others = engines.items()
    if sorted(checkpoint.others) != sorted(name for name, _ in others):
        raise UserError(
            f"{checkpoint.path} is a checkpoint of {_spelt(checkpoint.others)}, this run trains {_spelt(dict(others))}; "
            "choose another run_dir or the command it was made by"
        )
    parts = [(first[1], checkpoint.first), *((engine, checkpoint.others[name]) for name, engine in others)]
    for engine, saved in parts:
        _check(engine, saved, checkpoint.format)
    for engine, saved in parts:
        random = checkpoint.random if saved is checkpoint.first and same_layout(engine, checkpoint) else None
        why = f"{saved.path} could not be read; remove it to go on from the checkpoint before"
        with together(why):
            _screen(saved.path, why)
        with together(why), torch.no_grad():
            load_state(engine, saved.path, checkpoint.format, random)


def same_layout(engine: Engine, checkpoint: Checkpoint) -> bool:
    """Whether the first engine of a checkpoint was saved under this one's layout; random states belong to that."""
    return checkpoint.first.layout == layout_of(engine)


def load_weights(engine: Engine, directory: Path, leave: Collection[str] = ()) -> None:
    """Loads parameters alone from a Megatron distributed checkpoint of any layout and precision. Called by every rank.

    Rows that pad the vocabulary become zero.

    Args:
        leave: parameters that stay as they are.

    Raises:
        UserError: on every rank, when a tensor is missing or cannot be read.
    """
    why = f"{directory} could not be read"
    with together(why):
        _screen(directory, why)
    with together(why), torch.no_grad():
        load_parameters(engine, directory, leave)


def _screen(directory: Path, why: str) -> None:
    """Check, on the first rank of each node, that the files which the ranks load next run no code.

    Raises:
        UserError: it does, or is damaged; begins with `why`.
    """
    if int(os.environ.get("LOCAL_RANK", "0")) == 0:
        try:
            screen(directory)
        except UserError as error:
            raise UserError([f"{why}: {problem}" for problem in error.problems]) from None


def _check(engine: Engine, saved: Saved, format: Format) -> None:
    ours = identity(engine.hf)
    different = [f"{k}: {v} there, {ours.get(k)} here" for k, v in saved.model.items() if ours.get(k) != v]
    if different:
        raise UserError(
            f"{saved.path} is a checkpoint of another model than {engine.settings.model.path} ({'; '.join(different)}); "
            "choose another run_dir or the model it was made from"
        )
    if format == "same_layout":
        _check_same_layout(engine, saved)


def _check_same_layout(engine: Engine, saved: Saved) -> None:
    there, here = saved.layout, layout_of(engine)
    cut = cut_of(engine)
    changed = [f"{name} was {was!r}, is {cut.get(name)!r}" for name, was in saved.cut.items() if cut.get(name) != was]
    if there[:4] == here[:4] and not changed:  # the data-parallel ranks may be others
        return
    raise UserError(
        f"{saved.path} was written with checkpoint.format = 'same_layout' under {_layout(there)}, this run is {_layout(here)}"
        f"{''.join(f'; {each}' for each in changed)}; resume as it was, or save once with checkpoint.format = 'reshardable' there"
    )


def _layout(layout: list[int]) -> str:
    return " x ".join(f"{axis}{size}" for axis, size in zip(("TP", "PP", "VPP", "CP", "DP"), layout, strict=True))


def _spelt(others: Collection[str]) -> str:
    return "one model" + "".join(f" and {name}" for name in sorted(others))


def _to_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
