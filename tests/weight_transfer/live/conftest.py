"""What the tests of live weights share: models and servers, which end with the last of these tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.lib import families, world
from tests.weight_transfer.live import jobs
from tests.weight_transfer.live.servers import Servers


@pytest.fixture(scope="package")
def models(tmp_path_factory) -> Callable[[str], tuple[str, str]]:
    """family -> a directory that servers start from, and one of the same model with other weights."""
    made: dict[str, tuple[str, str]] = {}

    def get(family: str) -> tuple[str, str]:
        if family not in made:
            root = tmp_path_factory.mktemp("models")
            first, other = str(root / "first"), str(root / "other")
            world.run(1, families.make_language_model, first, family, 32)  # vLLM's attention has no smaller heads
            world.run(1, jobs.make_other, first, other)
            made[family] = first, other
        return made[family]

    return get


@pytest.fixture(scope="package")
def servers(models, tmp_path_factory) -> Iterator[Servers]:
    with Servers(tmp_path_factory.mktemp("servers")) as found:
        for family, tensor, rank in (("Llama", 2, 8), ("Qwen 3", 1, 0)):  # beside one another: each alone takes as long
            found.start(models(family)[0], tensor, lora_rank=rank)
        yield found
