"""A training run: its directory, its weights and progress, its guards, checkpoints and metrics, and the export at its end."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from tulu_mega.bridge.files.companions import OtherTokenizer
from tulu_mega.bridge.files.config_json import read_config
from tulu_mega.config import OptimSettings, RunSettings
from tulu_mega.config.lora import LoraSettings
from tulu_mega.data.chat import Template
from tulu_mega.data.other_tokenizer import other_tokenizer
from tulu_mega.data.tulu_template import TULU_CHAT_TEMPLATE
from tulu_mega.distributed import topology
from tulu_mega.distributed.collectives import together
from tulu_mega.errors import UserError
from tulu_mega.launch.launcher import World
from tulu_mega.launch.run_dir import CHECKPOINTS, locked
from tulu_mega.model.config import DTYPES
from tulu_mega.pins import ranks as pinned
from tulu_mega.resilience.guards import Guards
from tulu_mega.resilience.spikes import SIGNALS
from tulu_mega.train import checkpoint, kept
from tulu_mega.train.checkpoint import Checkpoint, Engines
from tulu_mega.train.checkpoint_files import verified_or_set_aside
from tulu_mega.train.metrics import FILE, MetricsLog, peak_flops
from tulu_mega.train.profiling import StepProfiler, late
from tulu_mega.train.save_figures import tell
from tulu_mega.train.save_schedule import SaveSchedule
from tulu_mega.train.saver import Saver
from tulu_mega.train.session import Session, opened

ADAPTER = "adapter"
"""Directory in the run directory that low-rank adapters are exported to."""


@dataclass(frozen=True)
class Beside:
    """Another model that a run trains, saves and exports."""

    session: Session
    """its own, weights loaded; the same world"""
    optim: OptimSettings
    updates: int
    """optimizer steps for each of the first model's"""
    folder: str
    """directory of the export in the run directory"""


@dataclass
class Run:
    """A session with a run directory; every rank makes one.

    Raises:
        UserError: on every rank, when the tokenizer that the settings name cannot go with the model.
    """

    settings: RunSettings
    session: Session
    beside: Mapping[str, Beside] = field(default_factory=dict, kw_only=True)
    """other models that train, by name"""
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
        return self.run_dir / CHECKPOINTS

    @property
    def engines(self) -> Engines:
        """The engines whose states a checkpoint holds, by name."""
        return {"model": self.session.engine, **{name: each.session.engine for name, each in self.beside.items()}}

    def initial_weights(self) -> None:
        """Load the weights that training begins with, from the model's directory; once.

        Raises:
            UserError: with everything that does not fit.
        """
        if not self._loaded:
            self.session.load_weights()
            self._loaded = True

    def weights(self, steps: int, updates: int = 1) -> Checkpoint | None:
        """Load weights and optimizer from the newest checkpoint whose weights are finite, which is returned, or begin with the
        model's own weights.

        Args:
            steps: steps of the whole run.
            updates: optimizer steps in each.

        Raises:
            UserError: on every rank, when more steps are done than the run is to have, or no checkpoint's weights are finite.
        """
        found = kept.newest(self.checkpoints)
        if found is None or self.session.engine.lora:  # frozen weights are in no checkpoint
            self.initial_weights()
        if found and found.step > steps:
            raise UserError(
                f"run_dir = {self.settings.run_dir} has {found.step:,} steps done, the settings ask for {steps:,}; raise "
                "train.steps (or train.epochs), or choose another run_dir"
            )
        while found and not verified_or_set_aside(found.path, kept.before(self.checkpoints, found), self.session.engine.at):
            found = kept.newest(self.checkpoints)  # the damaged one has another name by now
        tables = (self.settings.ddp, self.settings.optimizer)
        self.session.engine.prepare_training(self.settings.optim, steps * updates, *tables)
        for each in self.beside.values():
            each.session.engine.prepare_training(each.optim, steps * updates * each.updates, *tables)
        if found:
            if self.session.lead and (told := kept.advice(self.checkpoints, found)):
                print(f"warning: {told}", file=sys.stderr, flush=True)
            checkpoint.restore(self.engines, found)
            if not checkpoint.same_layout(self.session.engine, found):
                topology.seed_ranks(self.settings.seed, found.step)
        return found

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

    def saves(self, steps: int, guards: Guards, files: Callable[[], Mapping[str, bytes]] = dict) -> SaveSchedule:
        """Make the schedule of the run's checkpoints.

        Args:
            steps: steps of the whole run.
            guards: ask for a checkpoint when the run is to stop.
            files: as for `Saver`.
        """
        wanted = self.settings.checkpoint
        told = partial(tell, self.run_dir / FILE)
        saver = Saver(self.engines, self.checkpoints, wanted.keep, wanted.format, wanted.asynchronous, told, files)
        return SaveSchedule(saver, wanted.every, steps, guards.stop_requested)

    def profiler(self, start: int) -> StepProfiler:
        """Make this rank's profiler. Every rank calls it.

        Args:
            start: steps done before.
        """
        wanted, session = self.settings.train.profile, self.session
        if session.lead and (told := late(wanted, start)):
            print(f"warning: {told}", file=sys.stderr, flush=True)
        return StepProfiler(wanted, session.topology.rank, session.engine.platform.device, self.run_dir)

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
            peak_of=self.settings.model.dtype,
        )

    def export(self, guards: Guards, template: Template, ends: Sequence[int]) -> None:
        """Write the trained model to RUN_DIR/hf in Hugging Face format, if the settings want it.

        The tokenizer and the chat template that it was trained with go with it.

        Args:
            guards: say whether anything was learned.
            template: that template. As the tokens, rank 0's counts.
            ends: tokens that ended the turns it was trained on.

        Raises:
            UserError: on every rank, when nothing was learned, the weights are not finite, or the model cannot be written.
        """
        guards.check_learned()
        wanted = self.settings.checkpoint
        if not all(engine.finite_weights() for engine in self.engines.values()):  # the same on every rank
            raise UserError(
                f"the trained weights have NaN or infinity in them, and no model is exported. {self.checkpoints} keeps the "
                "newest checkpoint from before; begin anew with a lower optim.lr, or go on from it with --train.spike skip"
            )
        if not wanted.export:
            return
        dtype = DTYPES[self.settings.model.dtype if wanted.export_dtype == "model" else wanted.export_dtype]
        beside = {"chat_template.jinja": TULU_CHAT_TEMPLATE} if template == "tulu" else {}
        if self.session.engine.lora:
            self.session.export_adapters(self.run_dir / ADAPTER, dtype)
            if self.session.lead:
                print(f"adapters in PEFT's format: {self.run_dir / ADAPTER}", flush=True)
        directory = self.run_dir / "hf"
        self.session.export(directory, dtype, beside, self._tokenizer, ends)
        if self.session.lead:
            print(f"model in Hugging Face format: {directory}", flush=True)
        for name, each in self.beside.items():
            each.session.export(self.run_dir / each.folder, dtype, {})
            if self.session.lead:
                print(f"{name} model in Hugging Face format: {self.run_dir / each.folder}", flush=True)


@contextlib.contextmanager
def opened_session(
    settings: RunSettings,
    world: World,
    reward: bool,
    temperature: float = 1.0,
    shares: bool = False,
    lora: LoraSettings | None = None,
) -> Iterator[Session]:
    """Lock the run directory on rank 0, join the world and build the model; then all see whether the inputs are the run's.

    Args:
        reward: whether the model has a scalar head.
        temperature: that which a policy's responses are drawn at.
        shares: whether sequences are to share prefixes within a pack.
        lora: low-rank adapters, which alone are trained then.

    Raises:
        UserError: on every rank, for whatever the user can mend.
    """
    with contextlib.ExitStack() as stack:
        if world.rank == 0:
            stack.enter_context(locked(Path(settings.run_dir)))
        session = stack.enter_context(opened(settings, world, settings.seed, reward, temperature, shares, lora))
        pinned.settle(Path(settings.run_dir), settings.accept_changes, world.local_rank, session.watch.at)
        yield session
