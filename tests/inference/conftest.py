"""What the tests of servers share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tulu_mega.quickstart import tiny_model


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("tiny") / "model"
    tiny_model.make(directory, seed=0)
    return directory
