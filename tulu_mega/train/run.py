"""What every command shares that trains: a run directory, weights and how far it came, metrics, the export."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tulu_mega.bridge.files.companions import OtherTokenizer
from tulu_mega.bridge.files.config_json import read_config
from tulu_mega.config import RunSettings
from tulu_mega.data.chat import TULU_CHAT_TEMPLATE
from tulu_mega.data.other_tokenizer import other_tokenizer
from tulu_mega.distributed.collectives import together
from tulu_mega.errors import UserError
from tulu_mega.model.config import DTYPES
from tulu_mega.resilience.stragglers import Stragglers
from tulu_mega.train import checkpoint
from tulu_mega.train.checkpoint import Checkpoint
from tulu_mega.train.metrics import MetricsLog, peak_flops
from tulu_mega.train.session import Session


@dataclass
class Skips:
    """Updates that were not applied because their loss or gradient was not finite."""

    allowed: int
    """in a row"""
    file: Path
    """where their rows are written"""
    total: int = 0
    in_a_row: int = 0

    @property
    def state(self) -> dict[str, int]:
        """What a checkpoint keeps."""
        return {"skipped": self.total, "skipped_in_a_row": self.in_a_row}

    def restore(self, state: dict[str, Any]) -> None:
        self.total, self.in_a_row = state["skipped"], state["skipped_in_a_row"]

    def note(
        self, applied: bool, step: int, loss: float, grad_norm: float, rows: Callable[[], list[dict[str, Any]]], write: bool
    ) -> None:
        """Counts an update; writes the rows of one that was skipped.

        Args:
            step: from 1.
            rows: what it was of, for people.
            write: whether this is the rank that writes.

        Raises:
            UserError: too many in a row.
        """
        if applied:
            self.in_a_row = 0
            return
        self.total += 1
        self.in_a_row += 1
        if write:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with self.file.open("a") as file:
                skipped = {"step": step, "loss": str(loss), "grad_norm": str(grad_norm), "rows": rows()}
                file.write(json.dumps(skipped) + "\n")
        if self.in_a_row >= self.allowed:
            raise UserError(
                f"stopped at step {step}: loss or gradient was not finite in {self.in_a_row} steps in a row "
                f"(loss {loss}, gradient norm {grad_norm}); the rows of these batches are in {self.file}. "
                "Look at them, or lower optim.lr; train.max_skipped sets how many steps in a row are let pass"
            )


@dataclass
class Run:
    """A session with a run directory of its own; every rank makes it.

    Raises:
        UserError: on every rank, when the tokenizer that the settings name cannot go with the model.
    """

    settings: RunSettings
    session: Session
    _loaded: bool = field(default=False, init=False)
    _tokenizer: OtherTokenizer | None = field(default=None, init=False)
    """rank 0's: what the export has of another tokenizer than the model's own"""

    def __post_init__(self) -> None:
        name = self.settings.data.tokenizer
        if name is None or not self.settings.checkpoint.export:
            return
        with together(f"data.tokenizer = {name!r} cannot go with the model"):  # now, for at the end it would be too late
            if self.session.lead:
                source, trusted = self.session.source, self.settings.model.trust_remote_code
                self._tokenizer = other_tokenizer(name, source, read_config(source), self.session.engine.reward, trusted)

    @property
    def run_dir(self) -> Path:
        return Path(self.settings.run_dir)

    @property
    def checkpoints(self) -> Path:
        return self.run_dir / "checkpoints"

    def initial_weights(self) -> None:
        """The weights that training begins with, those of the model's directory; read once.

        Raises:
            UserError: with everything that does not fit.
        """
        if not self._loaded:
            self.session.load_weights()
            self._loaded = True

    def skips(self, allowed: int) -> Skips:
        """The count of updates that were not applied, none yet."""
        return Skips(allowed, self.run_dir / "logs" / "skipped.jsonl")

    def stragglers(self) -> Stragglers:
        """The ranks' paces beside each other; every rank calls it."""
        train, engine = self.settings.train, self.session.engine
        return Stragglers(train.straggler, train.log_every, engine.platform.device, self.session.topology.pipeline_rank)

    def weights(self, steps: int, updates: int = 1) -> Checkpoint | None:
        """Weights and optimizer: those of the newest checkpoint, which is given back, or the model's own.

        Args:
            steps: of the whole run.
            updates: optimizer steps in each.

        Raises:
            UserError: on every rank, when more steps are done than the run is to have.
        """
        found = checkpoint.find(self.checkpoints)
        if not found:
            self.initial_weights()
        elif found[-1].step > steps:
            raise UserError(
                f"run_dir = {self.settings.run_dir} has {found[-1].step:,} steps done, the settings ask for {steps:,}; raise "
                "train.steps (or train.epochs), or choose another run_dir"
            )
        self.session.engine.prepare_training(self.settings.optim, steps * updates)
        if not found:
            return None
        checkpoint.restore({"model": self.session.engine}, found[-1])
        return found[-1]

    def metrics(self, steps: int, start: int) -> MetricsLog:
        """The run's report, of which later lines than step `start` are cut off."""
        device = self.session.engine.platform.device
        return MetricsLog(
            self.settings.run_dir,
            self.settings,
            steps,
            resumed_step=start,
            world_size=self.session.topology.size,
            device=device,
            peak=peak_flops(device, DTYPES[self.settings.model.dtype]),
        )

    def export(self) -> None:
        """The trained model in Hugging Face format, to RUN_DIR/hf, if the settings want it.

        With it go the tokenizer and the chat template that it was trained with.
        """
        wanted = self.settings.checkpoint
        if not wanted.export:
            return
        dtype = DTYPES[self.settings.model.dtype if wanted.export_dtype == "model" else wanted.export_dtype]
        template = {"chat_template.jinja": TULU_CHAT_TEMPLATE} if self.settings.data.template == "tulu" else {}
        directory = self.run_dir / "hf"
        self.session.export(directory, dtype, template, self._tokenizer)
        if self.session.lead:
            print(f"model in Hugging Face format: {directory}", flush=True)
