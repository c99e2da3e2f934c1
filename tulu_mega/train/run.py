"""A training run: its directory, its weights and progress, its guards, checkpoints and metrics, and the export at its end."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tulu_mega.bridge.files.companions import OtherTokenizer
from tulu_mega.bridge.files.config_json import read_config
from tulu_mega.config import RunSettings
from tulu_mega.data.chat import TULU_CHAT_TEMPLATE
from tulu_mega.data.other_tokenizer import other_tokenizer
from tulu_mega.distributed.collectives import together
from tulu_mega.errors import UserError
from tulu_mega.launch.launcher import World
from tulu_mega.launch.run_dir import locked
from tulu_mega.model.config import DTYPES
from tulu_mega.resilience.guards import Guards
from tulu_mega.resilience.spikes import SIGNALS
from tulu_mega.train import checkpoint
from tulu_mega.train.checkpoint import Checkpoint, Engines
from tulu_mega.train.metrics import MetricsLog, peak_flops
from tulu_mega.train.save_schedule import SaveSchedule
from tulu_mega.train.saver import Saver
from tulu_mega.train.session import Session, opened


@dataclass
class Run:
    """A session with a run directory; every rank makes one.

    Raises:
        UserError: on every rank, when the tokenizer that the settings name cannot go with the model.
    """

    settings: RunSettings
    session: Session
    _loaded: bool = field(default=False, init=False)
    _tokenizer: OtherTokenizer | None = field(default=None, init=False)
    """Rank 0's part of the export that belongs to another tokenizer than the model's own."""

    def __post_init__(self) -> None:
        name = self.settings.data.tokenizer
        if name is None or not self.settings.checkpoint.export:
            return
        with together(f"data.tokenizer = {name!r} cannot go with the model"):  # now: at the end it would be too late
            if self.session.lead:
                source, trusted = self.session.source, self.settings.model.trust_remote_code
                self._tokenizer = other_tokenizer(name, source, read_config(source), self.session.engine.reward, trusted)

    @property
    def run_dir(self) -> Path:
        return Path(self.settings.run_dir)

    @property
    def checkpoints(self) -> Path:
        """Directory that holds the checkpoints."""
        return self.run_dir / "checkpoints"

    @property
    def engines(self) -> Engines:
        """The engines whose states a checkpoint holds, by name."""
        return {"model": self.session.engine}

    def initial_weights(self) -> None:
        """Load the weights that training begins with, from the model's directory; once.

        Raises:
            UserError: with everything that does not fit.
        """
        if not self._loaded:
            self.session.load_weights()
            self._loaded = True

    def weights(self, steps: int, updates: int = 1) -> Checkpoint | None:
        """Load weights and optimizer from the newest checkpoint, which is returned, or begin with the model's own weights.

        Args:
            steps: steps of the whole run.
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
        checkpoint.restore(self.engines, found[-1])
        return found[-1]

    def guards(self, found: Checkpoint | None, spike_signals: Sequence[str] = SIGNALS) -> Guards:
        """Make the run's guards. Every rank calls it.

        Args:
            found: the checkpoint that the run goes on from.
            spike_signals: see `Guards`.
        """
        session = self.session
        guards = Guards(
            self.settings.train,
            session.watch,
            session.engine.platform.device,
            session.topology.pipeline_rank,
            session.lead,
            self.run_dir / "logs" / "skipped.jsonl",
            spike_signals,
        )
        if found:
            guards.restore(found.state)
        return guards

    def saves(self, steps: int, guards: Guards) -> SaveSchedule:
        """Make the schedule of the run's checkpoints.

        Args:
            steps: steps of the whole run.
            guards: ask for a checkpoint when the run is to stop.
        """
        wanted = self.settings.checkpoint
        saver = Saver(self.engines, self.checkpoints, wanted.keep, wanted.format, wanted.asynchronous)
        return SaveSchedule(saver, wanted.every, steps, guards.stop_requested)

    def metrics(self, steps: int, start: int) -> MetricsLog:
        """Open the run's report and cut off the lines of steps later than `start`. Rank 0 only."""
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
        """Write the trained model to RUN_DIR/hf in Hugging Face format, if the settings want it.

        The tokenizer and the chat template that it was trained with go with it.
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


@contextlib.contextmanager
def opened_session(settings: RunSettings, world: World, reward: bool, temperature: float = 1.0) -> Iterator[Session]:
    """Lock the run directory on rank 0, then join the world and build the model.

    Args:
        reward: whether the model has a scalar head.
        temperature: that which a policy's responses are drawn at.

    Raises:
        UserError: on every rank, for whatever the user can mend.
    """
    with contextlib.ExitStack() as stack:
        if world.rank == 0:
            stack.enter_context(locked(Path(settings.run_dir)))
        yield stack.enter_context(opened(settings, world, settings.seed, reward, temperature))
