"""Traces of chosen steps by torch's profiler, and the operations that took most time in them.

RUN_DIR/profile gets two files a rank: a trace (Chrome's JSON, gzipped: chrome://tracing and ui.perfetto.dev open it) and the
operations by their time, which `tulu-mega report` shows.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.autograd.profiler_util import FunctionEventAvg
from torch.profiler import ProfilerActivity, profile, record_function

from tulu_mega.config import ProfileSettings
from tulu_mega.errors import UserError
from tulu_mega.launch.run_files import write_whole

FOLDER, OPERATIONS = "profile", ".operations.json"
SHOWN = 50
"""Operations in the table; the trace has all."""
BETWEEN = "between operations: Python, launches, waits"


class StepProfiler:
    """Profiles the steps that the settings name, on this rank; does nothing in others. A profile that fails ends no run.

    Args:
        settings: none profiles nothing.
        rank: this process's.
        device: the rank's.
        run_dir: the run's directory.
    """

    def __init__(self, settings: ProfileSettings | None, rank: int, device: torch.device, run_dir: Path):
        self._settings = settings if settings and rank in settings.ranks else None
        self._rank, self._device, self._directory = rank, device, run_dir / FOLDER
        self._profile: profile | None = None
        self._begun: int | None = None

    @contextlib.contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Wrap a step (from 1) of the run; the files are written at the end of the last one that is profiled, or of the run."""
        wanted = self._settings
        if wanted is None or not wanted.step - 1 <= number <= wanted.last:
            yield
            return
        self._before(number, wanted.step)
        try:
            with record_function(f"step {number}") if self._begun else contextlib.nullcontext():
                yield
        except BaseException:  # the run ends here: asked to, or by an error
            self._finish(number)
            raise
        if number == wanted.last:
            self._finish(number)

    def _before(self, number: int, first: int) -> None:
        """Begin to record; in the step before, get ready for it, since a GPU's recorder takes a while to start."""
        with self._forgiven():
            if self._profile is None:
                activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._device.type == "cuda" else [])]
                self._profile = profile(activities=activities)
                self._profile.prepare_trace()
            if number >= first and self._begun is None:
                self._profile.start_trace()
                self._begun = number

    def _finish(self, last: int) -> None:
        traced, self._profile = self._profile, None
        if traced is None or self._begun is None:
            return
        with self._forgiven():
            traced.stop_trace()
            self._write(traced, last)

    def _write(self, traced: profile, last: int) -> None:
        name = f"steps_{self._begun:06}_to_{last:06}_rank_{self._rank}"
        trace = self._directory / f"{name}.json.gz"
        self._directory.mkdir(parents=True, exist_ok=True)
        partial = self._directory / f".partial_{name}.json.gz"
        try:
            traced.export_chrome_trace(str(partial))
            os.replace(partial, trace)
        finally:
            partial.unlink(missing_ok=True)
        found = {
            "rank": self._rank,
            "first_step": self._begun,
            "last_step": last,
            "device": self._device.type,
            "trace": trace.name,
            **operations(traced.key_averages(), self._device.type),
        }
        write_whole(self._directory / f"{name}{OPERATIONS}", json.dumps(found, indent=1) + "\n")

    @contextlib.contextmanager
    def _forgiven(self) -> Iterator[None]:
        try:
            yield
        except (OSError, RuntimeError, UserError) as error:
            self._settings = self._profile = self._begun = None
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            print(f"warning: train.profile: rank {self._rank} has no profile: {reason}", file=sys.stderr, flush=True)


def operations(averages: list[FunctionEventAvg], device: str) -> dict[str, Any]:
    """Return what took the device's time: a GPU's kernels; a CPU's operations, without those that they call.

    Returns:
        ``microseconds`` of all together, and the longest as ``operations``: ``name``, ``self_microseconds``, ``calls``.
    """
    on_cpu = device == "cpu"
    times: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    for each in averages:
        if on_cpu != (each.device_type == torch.autograd.DeviceType.CPU) or (each.is_user_annotation and not on_cpu):
            continue
        name = BETWEEN if each.key.startswith("step ") else each.key
        times[name] += each.self_cpu_time_total if on_cpu else each.self_device_time_total
        calls[name] += each.count
    return {
        "microseconds": sum(times.values()),
        "operations": [
            {"name": name, "self_microseconds": time, "calls": calls[name]} for name, time in times.most_common(SHOWN) if time > 0
        ],
    }


def late(settings: ProfileSettings | None, start: int) -> str:
    """Return a warning for a run that goes on after the steps which it was to profile; else an empty text.

    Args:
        start: steps done before.
    """
    if settings is None or start < settings.last:
        return ""
    return f"train.profile: {settings.window} are done already, the run goes on after step {start:,}; nothing is profiled"
