"""A whole run that other runs are compared with."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.lib.grpo_runs import ended, make_place, start


@pytest.fixture(scope="session")
def place(tmp_path_factory) -> Path:
    """Model, prompts, verifier, reward model and settings of `tulu-mega grpo`."""
    pytest.importorskip("vllm")
    return make_place(tmp_path_factory.mktemp("grpo"))


@pytest.fixture(scope="session")
def undisturbed(place) -> Path:
    """The directory of a run that nothing happened to."""
    ended(start(place, "undisturbed"), place, "undisturbed")
    return place / "undisturbed"
