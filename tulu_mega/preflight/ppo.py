"""What is wrong with a stage that trains a policy beside a value model."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from tulu_mega.config import PpoSettings
from tulu_mega.errors import UserError
from tulu_mega.pins.directories import Directory
from tulu_mega.preflight import policy, run
from tulu_mega.preflight.findings import Findings


def problems(settings: PpoSettings, findings: Findings) -> None:
    """Find problems of the run, its servers, its prompts, its reward model and its value model."""
    policy.problems(settings, findings)
    run.pin(findings, "value.path", Directory(settings.value.path, code=settings.model.trust_remote_code))
    findings.collect(lambda: _value_model(settings, findings.config))
    findings.collect(lambda: _its_world(settings))


def _value_model(settings: PpoSettings, config: Mapping[str, Any] | None) -> None:
    """The value model has the policy's tokens, and a head."""
    advice = None if settings.value.new_head else "set value.new_head to draw a head for it"
    policy.of_the_policys_tokens(settings, "value.path", settings.value.path, config, advice, settings.value.parallel)


def _its_world(settings: PpoSettings) -> None:
    """The value model's layout takes as many ranks as there will be, where only the environment tells how many."""
    parallel, own = settings.parallel, settings.value.parallel
    if own is None:
        return
    joined = "RANK" in os.environ and os.environ.get("WORLD_SIZE", "").isdecimal()
    try:
        own.replicas(int(os.environ["WORLD_SIZE"]) if joined else parallel.model_parallel * (parallel.data or 1))
    except UserError as error:
        unsaid = "" if joined or parallel.data else " (under torchrun there may be more: then set parallel.data)"
        raise UserError([f"value.{problem}{unsaid}" for problem in error.problems]) from None
