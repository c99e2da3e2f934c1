"""Runs that others are compared with, and a server that several of them have one after another."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.invariant.server import served as serving
from tests.lib.grpo_runs import ended, make_place, start


@pytest.fixture(scope="session")
def place(tmp_path_factory) -> Path:
    """Model, prompts, verifier, reward model and settings of `tulu-mega grpo`."""
    pytest.importorskip("vllm")
    return make_place(tmp_path_factory.mktemp("grpo"))


@pytest.fixture(scope="session")
def served(place) -> Iterator[tuple[list[str], dict[str, str]]]:
    """Flags and environment variables of runs that have their responses from one server of `tulu-mega serve`."""
    with serving(place, "--rollout.max_model_len", "128") as attached:
        yield attached


@pytest.fixture(scope="session")
def undisturbed(place, served) -> Path:
    """The directory of a run that nothing happened to."""
    flags, variables = served
    ended(start(place, "undisturbed", *flags, **variables), place, "undisturbed")
    return place / "undisturbed"
