"""What is wrong with a command that asks a model, and trains none."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tulu_mega.bridge.adapter_fit import fitting, of_a_reward_model, remarks
from tulu_mega.bridge.families.reward import check_language_model
from tulu_mega.bridge.files.hub import model_directory
from tulu_mega.config import GenerateSettings, ScoreSettings, ServeSettings
from tulu_mega.data import score_input
from tulu_mega.errors import UserError
from tulu_mega.inference.adapters import checked
from tulu_mega.inference.for_run import device_obstacles, server_options
from tulu_mega.inference.generate import how_taken, prepared
from tulu_mega.inference.offline import check_vllm
from tulu_mega.launch.run_dir import CONFIG
from tulu_mega.outside.json_input import read_json_text
from tulu_mega.preflight.findings import Findings
from tulu_mega.preflight.model import any_model_problems


def problems(settings: GenerateSettings, findings: Findings) -> None:
    """Of a model that vLLM is to load, and of all rows that it is to answer."""
    ready = findings.collect(lambda: prepared(settings))
    if ready:
        findings.notes += [*check_vllm(settings.python).notes, *ready.told]
    if ready and ready.rows:
        findings.notes.append(f"{settings.input}: {how_taken(ready.rows, ready.settings)}")


def serve_problems(settings: ServeSettings, findings: Findings) -> None:
    """Of servers on this machine."""
    findings.collect(lambda: _generating(settings.model.path))
    if python := findings.collect(lambda: check_vllm(settings.rollout.python, "rollout.python")):
        findings.notes += python.notes
    if not findings.problems:
        findings.collect(lambda: server_options(settings.model, settings.rollout, None, ()))
        findings.notes += findings.collect(lambda: checked(settings.model.path, settings.adapter)) or []
        findings.problems += device_obstacles(settings.rollout, 0)


def score_problems(settings: ScoreSettings, findings: Findings) -> None:
    """Of texts that are to be scored."""
    any_model_problems(settings, findings)
    findings.collect(lambda: _scorable(settings, findings.config))
    if (path := settings.adapter) and (config := findings.config):
        findings.collect(lambda: fitting(path, config, of_a_reward_model(path)))
        findings.notes += findings.collect(lambda: remarks(path, settings.model.path)) or []


def _generating(path: str) -> None:
    """A model for vLLM: what its config.json says; the rest is seen by the command itself before vLLM starts."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        config = read_json_text((model_directory(path) / CONFIG).read_text())
        check_language_model(path, config.get("architectures"))


def _scorable(settings: ScoreSettings, config: Mapping[str, Any] | None) -> None:
    output = Path(settings.output)
    if not output.absolute().parent.is_dir():
        raise UserError(f"output = {settings.output}: {output.absolute().parent} is no directory; make it first")
    rows = score_input.read(settings.input)
    encode = score_input.encoder(settings, [row for _where, row in rows], config["vocab_size"] if config else None)
    problems = []
    for where, row in rows:
        try:
            encode(row)
        except ValueError as error:
            problems.append(f"{where}: {error}")
    if problems:
        raise UserError(problems[:20] + ([f"... {len(problems)} rows cannot be scored"] if len(problems) > 20 else []))
