"""Servers in FP8 blocks compute with the numbers and scales that a trainer sent them: their log-probabilities are those of
transformers with weights rounded so, not those with the trainer's."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import pytest

from tests.lib import world
from tests.lib.layouts import LAYOUTS, size
from tests.weight_transfer.live import fp8, jobs
from tests.weight_transfer.live.servers import one
from tulu_mega.weight_transfer.server import ServerAddress

pytest.importorskip("vllm")
pytestmark = fp8.CAN_SERVE

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


@pytest.fixture(scope="module")
def blocks(made, tmp_path_factory) -> Iterator[ServerAddress]:
    """A server with two workers. Others end with the test that wants them: together they would fill the memory."""
    with one(made("llama")[0][0], tmp_path_factory.mktemp("blocks"), 2, "bfloat16", fp8=True) as server:
        yield server


def check(made, server, model_type: str, trainer: str) -> None:
    layout, (first, other) = LAYOUTS[trainer], made(model_type)
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
    assert [each.last_answer for each in answers[0]] == [each.last_answer for each in answers[2]]
    assert [each.last_answer for each in answers[0]] != [each.last_answer for each in answers[1]]


def test_servers_compute_with_what_they_were_sent(made, blocks):
    check(made, blocks, "llama", "TP2xPP2")


@pytest.mark.acceptance
@pytest.mark.parametrize(("model_type", "trainer", "tensor"), GRID)
def test_families_and_layouts(made, tmp_path, model_type, trainer, tensor):
    with one(made(model_type)[0][0], tmp_path, tensor, "bfloat16", fp8=True) as server:
        check(made, server, model_type, trainer)


def test_servers_of_the_other_kind_are_not_touched(made, blocks):
    """The trainer ends before it sends anything; the server goes on serving."""
    plain, _ = made("llama")[0]
    version = next(VERSIONS)
    ((report, _),) = world.run(1, jobs.push, plain, {}, [blocks], version, "bf16", None, FP8)
    assert report.failed == {}
    before = jobs.generated(blocks, jobs.settings(**FP8), version)
    told = "started with rollout.quantization = 'fp8', this trainer has 'none'; give both the same"
    with pytest.raises(AssertionError, match="UserError") as failure:
        world.run(2, jobs.push, plain, LAYOUTS["TP2"], [blocks], next(VERSIONS), "bf16", None, BF16)
    assert str(failure.value).count(f'UserError("{blocks.url}: {told}")') == 2  # each rank
    assert jobs.generated(blocks, jobs.settings(**FP8), version) == before


@pytest.mark.acceptance
def test_a_server_in_bf16_gets_no_blocks(made, tmp_path):
    plain, _ = made("llama")[0]
    with one(plain, tmp_path, 2, "bfloat16") as server:
        with pytest.raises(AssertionError, match=r"started with rollout\.quantization = 'none', this trainer has 'fp8'"):
            world.run(1, jobs.push, plain, {}, [server], next(VERSIONS), "bf16", None, FP8)
        version = next(VERSIONS)
        ((report, _),) = world.run(1, jobs.push, plain, {}, [server], version, "bf16", None, BF16)
        assert report.failed == {}
        assert fp8.distance(jobs.generated(server, jobs.settings(**BF16), version), plain) < 0.03
