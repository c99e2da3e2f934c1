"""Trainers that compute in FP8, their weights too, give them to real vLLM servers in FP8 blocks."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest

from tests.lib import world
from tests.standins.transformer_engine.test_training import BLOCKWISE, KEPT_BLOCKWISE, OFF
from tests.weight_transfer.live import fp8, jobs
from tests.weight_transfer.live.servers import one
from tulu_mega.weight_transfer.server import ServerAddress

pytest.importorskip("vllm")
pytestmark = [pytest.mark.ranks, pytest.mark.acceptance, fp8.CAN_SERVE]

ROLLOUT = {"quantization": "fp8", "dtype": "bf16"}
VERSIONS = itertools.count()
TRAINERS = [OFF, BLOCKWISE, KEPT_BLOCKWISE]  # numbers kept `tensorwise` are rounded once more


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    directory = str(tmp_path_factory.mktemp("fp8") / "model")
    world.run(1, fp8.make_model, directory, "llama")
    fp8.round_matrices(directory, f"{directory}_rounded")
    return directory


@pytest.fixture(scope="module")
def server(model, tmp_path_factory) -> Iterator[ServerAddress]:
    with one(model, tmp_path_factory.mktemp("servers"), 1, "bfloat16", fp8=True) as server:
        yield server


@pytest.mark.parametrize("precision", TRAINERS, ids=str)
def test_servers_have_what_an_fp8_trainer_has(model, server, precision):
    version = next(VERSIONS)
    ((report, _),) = world.run(1, jobs.push, model, {}, [server], version, "bf16", None, ROLLOUT, precision)
    assert report.failed == {}
    rollouts = jobs.generated(server, jobs.settings(**ROLLOUT), version)
    from_rounded = fp8.distance(rollouts, f"{model}_rounded")
    assert from_rounded < 0.03  # of activations in bf16
    assert fp8.distance(rollouts, model) > 3 * from_rounded
