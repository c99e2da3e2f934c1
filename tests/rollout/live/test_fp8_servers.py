"""Servers in FP8 blocks compute with the numbers and scales that a trainer sent them: their log-probabilities are those of
transformers with weights rounded so, not those with the trainer's."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest

from tests.distributed import world
from tests.distributed.layouts import LAYOUTS, size
from tests.rollout.live import fp8, jobs
from tulu_mega.platforms.fp8 import server_obstacles

pytest.importorskip("vllm")
pytestmark = pytest.mark.skipif(bool(server_obstacles()), reason="vLLM's FP8 products want a GPU or a CPU with AMX")

VERSIONS = itertools.count(1)
BF16 = {"dtype": "bf16"}
FP8 = BF16 | {"quantization": "fp8"}
GRID = [("llama", "TP2", 1), ("qwen3", "CP2", 2), ("olmo2", "PP2xVPP2", 1)]  # model type, trainer, vLLM's tensor parallel size


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Callable[[str], list[tuple[str, str]]]:
    """model type -> two sets of weights, each as the trainer has it and as FP8 blocks have it."""
    found: dict[str, list[tuple[str, str]]] = {}

    def get(model_type: str) -> list[tuple[str, str]]:
        if model_type not in found:
            root = tmp_path_factory.mktemp(model_type)
            first, other = str(root / "first"), str(root / "other")
            world.run(1, fp8.make_model, first, model_type)
            world.run(1, jobs.make_other, first, other)
            found[model_type] = [(plain, f"{plain}_rounded") for plain in (first, other)]
            for plain, rounded in found[model_type]:
                fp8.round_matrices(plain, rounded)
        return found[model_type]

    return get


def check(made, servers, model_type: str, trainer: str, tensor: int) -> None:
    layout, (first, other) = LAYOUTS[trainer], made(model_type)
    server = servers.get(first[0], tensor, "bfloat16", fp8=True)
    answers = []
    for plain, rounded in (first, other, first):  # the second and the third find weights that vLLM has repacked
        version = next(VERSIONS)
        for report, _ in world.run(size(layout), jobs.push, plain, layout, [server], version, "bf16", None, FP8):
            assert report.failed == {} and report.version == version
        answers.append(jobs.generated(server, jobs.settings(**FP8), version))
        from_rounded = fp8.distance(answers[-1], rounded)
        assert from_rounded < 0.03  # of activations in bf16
        assert fp8.distance(answers[-1], plain) > 3 * from_rounded
    assert [each.sampler_logp for each in answers[0]] == [each.sampler_logp for each in answers[2]]
    assert [each.response_ids for each in answers[0]] == [each.response_ids for each in answers[2]]
    assert [each.response_ids for each in answers[0]] != [each.response_ids for each in answers[1]]


def test_servers_compute_with_what_they_were_sent(made, servers):
    check(made, servers, "llama", "TP2xPP2", 2)


@pytest.mark.acceptance
@pytest.mark.parametrize(("model_type", "trainer", "tensor"), GRID)
def test_families_and_layouts(made, servers, model_type, trainer, tensor):
    check(made, servers, model_type, trainer, tensor)


@pytest.mark.parametrize(
    ("blocks", "told"),
    [
        (True, "this server's layers are FP8 blocks, the trainer sends none"),
        pytest.param(False, "the trainer sends FP8 blocks, this server's layers have none", marks=pytest.mark.acceptance),
    ],
)
def test_the_other_kind_is_refused_and_the_right_one_heals(made, servers, blocks, told):
    plain, rounded = made("llama")[0]
    server = servers.get(plain, 2, "bfloat16", fp8=blocks)
    wrong, right = (BF16, FP8) if blocks else (FP8, BF16)
    ((report, _),) = world.run(1, jobs.push, plain, {}, [server], next(VERSIONS), "bf16", None, wrong)
    assert told in report.failed[server.url] and "the same rollout.quantization" in report.failed[server.url]
    assert "got nothing" not in report.failed[server.url]
    version = next(VERSIONS)
    ((report, _),) = world.run(1, jobs.push, plain, {}, [server], version, "bf16", None, right)
    assert report.failed == {}
    assert fp8.distance(jobs.generated(server, jobs.settings(**right), version), rounded if blocks else plain) < 0.03
