"""These tests' ranks are forks of a server of their own, so they run in a process without other tests."""

from __future__ import annotations

import os
import sys

import pytest

from tests.standins.transformer_engine.package import DIRECTORY

WARM = "tests.standins.transformer_engine.warm"
if "tests.lib.world" not in sys.modules:
    os.environ["TULU_MEGA_WARM"] = WARM

from tests.lib import world  # noqa: E402


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = None
    if world.WARM != WARM:
        reason = "run by itself: pytest tests/standins/transformer_engine"
    elif not DIRECTORY.is_dir():
        reason = f"no Transformer Engine in {DIRECTORY}: make venv"
    for item in items:
        if reason and "tests/standins/transformer_engine/" in item.nodeid:
            item.add_marker(pytest.mark.skip(reason=reason))


def origins() -> list[set[str]]:
    """The packages that a rank's linear layers and its AdamW are from."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec
    from megatron.core.optimizer import Adam

    linear = get_gpt_layer_with_transformer_engine_spec().submodules.self_attention.submodules.linear_qkv
    return [{each.__module__.partition(".")[0] for each in found.__mro__} for found in (linear, Adam)]


@pytest.fixture(scope="session", autouse=True)
def ranks_have_it():
    """A fork server passes over what it cannot import."""
    assert all("transformer_engine" in packages for packages in world.run(1, origins)[0])
