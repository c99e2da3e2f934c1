"""What the tests of servers share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.lib.fake_server import serve as serve


@pytest.fixture(scope="session")
def model(tiny) -> Path:
    return tiny
