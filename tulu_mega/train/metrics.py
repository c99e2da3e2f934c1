"""The report of a run: RUN_DIR/metrics.jsonl, the console and, if the settings want it, wandb. Rank 0 only.

metrics.jsonl has one object a step. Keys: ``step`` (finished steps, from 1) · ``loss`` · ``grad_norm`` (before clipping) ·
``lr`` · ``tokens`` ``supervised_tokens`` (of the global batch, padding not counted) · ``tokens_per_second``
``supervised_tokens_per_second`` (all ranks together) · ``padding`` (share of the packed positions) · ``tflops`` (1e12 FLOP/s
of one process) · ``mfu`` (share of the device's dense peak; null where that is unknown) · ``mfu_peak`` (whose peak that is: that
of ``model.dtype``, "bf16" or "fp32"; FP8's is twice bf16's, yet an FP8 run's share is of bf16's) · ``seconds_data``
``seconds_forward_backward`` (up to the gradient's norm) ``seconds_optimizer`` ``seconds_checkpoint`` (that saving took since the
step before) ·
``memory_gib`` (peak so far) · ``memory_reserved_gib`` (peak of what CUDA's allocator held for it, free blocks and gaps between
blocks included; null on a CPU) · in some steps ``slowest_rank`` ``slowest_host`` ``slowest_times_median`` (see `stragglers`) · of
stages with ``[heldout]``, in steps that end with an evaluation, ``heldout_loss`` and other means and ``seconds_evaluation`` · in
steps that were saved, as soon as the checkpoint is there, ``save_seconds`` (from its beginning), ``save_waited_seconds`` (of
these, that training stood still) and ``save_memory_gib`` (main memory at the peak, above what was held at the beginning; each of
the rank that has most; see `save_figures`) · and whatever the recipe adds. Rates leave the seconds of checkpoints and
evaluations out. Where rows are held out, `sft`, `rm` and `dpo` begin with a line of step 0, which has nothing but the figures of
an evaluation: what the weights gave that the run began with. JSON has no NaN: what is not finite is written as the string
``"NaN"``, ``"Infinity"`` or ``"-Infinity"``, which ``float()`` reads back.
"""

from __future__ import annotations

import json
import math
import secrets
import statistics
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from tulu_mega.config import RunSettings, WandbSettings
from tulu_mega.errors import Stopped
from tulu_mega.launch.run_files import Lines, write_whole
from tulu_mega.layout.hardware import named_peak
from tulu_mega.outside.json_input import read_json_text

if TYPE_CHECKING:
    import torch

    from tulu_mega.resilience.guards import GuardReport

FILE = "metrics.jsonl"


@dataclass(frozen=True)
class StepSeconds:
    """Wall-clock seconds of a step by part."""

    data: float
    forward_backward: float
    optimizer: float
    checkpoint: float = 0.0

    @property
    def working(self) -> float:
        """Seconds without the checkpoint; rates are measured over these."""
        return self.data + self.forward_backward + self.optimizer


@dataclass(frozen=True)
class StepRecord:
    """A recipe's figures of a step, over the whole global batch."""

    step: int
    """Number of finished steps, this one included."""
    loss: float
    grad_norm: float
    """Gradient norm before clipping."""
    lr: float
    tokens: int
    """Number of tokens without padding."""
    supervised_tokens: int
    padding: float
    """Share of the packed positions that hold no token, 0 to 1."""
    flops: float
    """FLOP of the whole step, all ranks together (`layout.flops.training_flops`)."""
    seconds: StepSeconds
    extra: Mapping[str, float | int | None] = field(default_factory=dict)
    """Further values by their names in metrics.jsonl."""
    told: tuple[str, ...] = ()
    """Names of the further values that the console line shows."""


class MetricsLog:
    """Writes steps to the run directory, the console and wandb.

    Args:
        run_dir: the run's directory; made if missing.
        settings: shown to wandb as the run's configuration.
        total_steps: last step of the run.
        resumed_step: step of the checkpoint that the run goes on from; later lines of metrics.jsonl are cut off, so that the
            file reads as one undisturbed run.
        world_size: processes that share the work.
        device: whose memory is reported; CPU when None.
        peak: the device's dense FLOP/s (`peak_flops`); None leaves mfu null.
        peak_of: the number format whose peak that is.
        console: where progress goes; standard output when None.
    """

    def __init__(
        self,
        run_dir: str | Path,
        settings: RunSettings,
        total_steps: int,
        *,
        resumed_step: int = 0,
        world_size: int = 1,
        device: torch.device | None = None,
        peak: float | None = None,
        peak_of: str = "bf16",
        console: TextIO | None = None,
    ):
        directory = Path(run_dir)
        cut_after(directory / FILE, resumed_step or -1)  # a run that begins anew evaluates anew before its first step
        self._file = Lines(directory / FILE)
        self._world_size, self._device, self._peak, self._peak_of = world_size, device, peak, peak_of
        self._console = _Console(console or sys.stdout, total_steps, resumed_step, settings.train.log_every)
        self._wandb = _Wandb(settings.wandb, directory, settings.model_dump())

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, exception_type, *_: object) -> None:
        self.close(failed=exception_type not in (None, Stopped))

    def step(self, record: StepRecord, guards: GuardReport | None = None) -> None:
        """Reports one step; its line is on disk when this returns (with the operating system, not yet synced).

        Args:
            guards: what the guards add to the step's figures, to its console line and to standard error.

        Raises:
            UserError: the line cannot be written.
        """
        values = self._values(record) | dict(guards.figures if guards else {})
        self._write(values)
        self._console.step(values, record.told, guards.remark if guards else "")
        for warning in guards.warnings if guards else ():
            print(f"warning: step {record.step}: {warning}", file=sys.stderr, flush=True)
        self._wandb.log(values)

    def evaluated(self, step: int, values: Mapping[str, float]) -> None:
        """Prints the figures of held-out rows on the console; the step's record must carry them too."""
        self._console.say(f"step {step}  " + "  ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in values.items()))

    def _write(self, values: Mapping[str, Any]) -> None:
        self._file.append(json.dumps({name: json_number(value) for name, value in values.items()}, allow_nan=False))

    def before_first_step(self, values: Mapping[str, float], seconds: float) -> None:
        """Reports the figures of held-out rows by the weights that the run begins with: the line of step 0.

        Args:
            seconds: that the evaluation took.

        Raises:
            UserError: the line cannot be written.
        """
        self.evaluated(0, values)
        line = {"step": 0, **values, "seconds_evaluation": seconds}
        self._write(line)
        self._wandb.log(line)

    def close(self, failed: bool = False) -> None:
        """Ends the report; `failed` marks the wandb run."""
        self._file.close()
        self._console.close()
        self._wandb.finish(failed)

    def _values(self, record: StepRecord) -> dict[str, Any]:
        seconds = record.seconds
        working = max(seconds.working, 1e-9)
        per_process = record.flops / working / self._world_size
        return {
            "step": record.step,
            "loss": record.loss,
            "grad_norm": record.grad_norm,
            "lr": record.lr,
            "tokens": record.tokens,
            "supervised_tokens": record.supervised_tokens,
            "tokens_per_second": record.tokens / working,
            "supervised_tokens_per_second": record.supervised_tokens / working,
            "padding": record.padding,
            "tflops": per_process / 1e12,
            "mfu": per_process / self._peak if self._peak else None,
            "mfu_peak": self._peak_of if self._peak else None,
            "seconds_data": seconds.data,
            "seconds_forward_backward": seconds.forward_backward,
            "seconds_optimizer": seconds.optimizer,
            "seconds_checkpoint": seconds.checkpoint,
            "memory_gib": peak_memory(self._device) / 2**30,
            "memory_reserved_gib": reserved_memory(self._device),
            **record.extra,
        }


def cut_after(file: Path, step: int) -> None:
    """Drops the lines of later steps, and a last line that a crash tore, from a metrics file."""
    if not file.exists():
        return
    lines = file.read_bytes().splitlines(keepends=True)
    kept = [line for line in lines if (found := step_of(line)) is not None and found <= step]
    if kept != lines:
        write_whole(file, b"".join(kept).decode())


def step_of(line: bytes) -> int | None:
    """The step of a line of metrics.jsonl; None for a line that is torn or is no step's."""
    try:
        step = read_json_text(line)["step"]
    except (ValueError, TypeError, KeyError):
        return None
    return step if line.endswith(b"\n") and isinstance(step, int) else None


def json_number(value: Any) -> Any:
    """The value as JSON can have it: text in the place of a number that is not finite, which ``float()`` reads back."""
    if not isinstance(value, float) or math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


class _Console:
    """One readable line every few steps; on a terminal a progress bar below them."""

    def __init__(self, stream: TextIO, total: int, done: int, every: int):
        self._total, self._every, self._stream = total, every, stream
        self._seconds: deque[float] = deque(maxlen=20)
        self._last = time.monotonic()
        self._bar = None
        if stream.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

            columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
            self._bar = Progress(*columns, console=Console(file=stream), transient=True)
            self._task = self._bar.add_task("", total=total, completed=done)
            self._bar.start()

    def step(self, values: Mapping[str, Any], told: Sequence[str] = (), remark: str = "") -> None:
        now = time.monotonic()
        self._seconds.append(now - self._last)
        self._last = now
        step = values["step"]
        left = clock(statistics.median(self._seconds) * (self._total - step))
        if self._bar:
            self._bar.update(self._task, completed=step, description=f"{left} left")
        if step % self._every and step != self._total:
            return
        mfu = f"  mfu {values['mfu']:.1%}" if values["mfu"] is not None else ""
        more = "".join(f"{name.replace('_', ' ')} {values[name]:.3g}  " for name in told)
        remark = f"{remark}  " if remark else ""
        line = (
            f"step {step:>{len(str(self._total))}}/{self._total}  {more}loss {values['loss']:.4f}  "
            f"grad {values['grad_norm']:.3f}  lr {values['lr']:.2e}  "
            f"{values['tokens_per_second']:,.0f} tokens/s{mfu}  {remark}{left} left"
        )
        self.say(line)

    def say(self, line: str) -> None:
        """Prints a line, above the bar where there is one."""
        if self._bar:
            self._bar.console.print(line, highlight=False)
        else:
            print(line, file=self._stream, flush=True)

    def close(self) -> None:
        if self._bar:
            self._bar.stop()


def clock(seconds: float) -> str:
    """Seconds as ``h:mm:ss`` or ``m:ss``."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


class _Wandb:
    """A wandb run whose failure does not disturb the training: it warns of the first failure and logs nothing after it."""

    def __init__(self, settings: WandbSettings, run_dir: Path, config: dict[str, Any]):
        self._run = None
        if settings.mode == "disabled":
            return
        id_file = run_dir / "wandb_id"
        try:
            import wandb

            if not id_file.exists():
                id_file.write_text(secrets.token_hex(8))
            self._run = wandb.init(
                project=settings.project,
                name=settings.name or run_dir.resolve().name,
                id=id_file.read_text().strip(),
                resume="allow",  # a resumed run stays one run in wandb
                mode=settings.mode,
                dir=run_dir,
                config=config,
                settings=wandb.Settings(silent=True, console="off"),
            )
        except Exception as error:
            self._give_up("cannot start", error)

    def log(self, values: Mapping[str, Any]) -> None:
        if self._run is None:
            return
        try:
            self._run.log({k: v for k, v in values.items() if k != "step" and v is not None}, step=values["step"])
        except Exception as error:
            self._give_up("stopped", error)

    def finish(self, failed: bool) -> None:
        if self._run is None:
            return
        try:
            self._run.finish(exit_code=int(failed))
        except Exception as error:
            self._give_up("did not finish", error)

    def _give_up(self, what: str, error: Exception) -> None:
        self._run = None
        reason = str(error).strip().splitlines() or [type(error).__name__]
        print(
            f"warning: wandb {what}: {reason[0]}; the run goes on without it, metrics are in {FILE}", file=sys.stderr, flush=True
        )


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Dense peak FLOP/s of a GPU in bf16 or fp32, by its name (H100, H200, A100).

    Returns:
        FLOP/s, or None for a GPU that is not in the table, and for CPUs: theirs is written nowhere, and one that is measured is
        what the machine had left at that moment, of which a run may then reach 150%.
    """
    import torch

    if device.type == "cpu":
        return None
    name = torch.cuda.get_device_name(device)
    return named_peak(name, dtype == torch.float32)


def peak_memory(device: torch.device | None) -> int:
    """Peak bytes held by this process: by CUDA's allocator on a GPU, as resident memory on a CPU."""
    if device is not None and device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def reserved_memory(device: torch.device | None) -> float | None:
    """Peak GiB that CUDA's allocator held of the GPU for this process, used or not; None on a CPU."""
    if device is None or device.type != "cuda":
        return None
    import torch

    return torch.cuda.max_memory_reserved(device) / 2**30
