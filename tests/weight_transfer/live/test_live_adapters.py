"""Adapters alone travel to servers that hold them beside the model's weights; these then compute what the trainer computes."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import httpx
import pytest
import torch
from safetensors.torch import load_file

from tests.lib import adapter_files, world
from tests.lib.layouts import LAYOUTS, size
from tests.weight_transfer.live import adapters, jobs
from tests.weight_transfer.live.senders import Senders
from tests.weight_transfer.live.servers import one
from tulu_mega.vllm_plugin.batch_route import ROUTE
from tulu_mega.weight_transfer.server import ServerFailure

pytestmark = [pytest.mark.alone, pytest.mark.servers]

pytest.importorskip("vllm")

BOUND = 1.6e-5
VERSIONS = itertools.count(1000)
GRID = [  # family, trainer, vLLM's tensor parallel size, transport, adapters
    ("OLMo 2", "TP2xPP2", 2, "shm", {"rank": 3, "alpha": 6.0}),
    ("Qwen 3", "DP2xTP2", 1, "gloo", {"rank": 16, "alpha": 8.0, "rslora": True, "targets": ["q_proj", "v_proj", "down_proj"]}),
]


def nbytes(directory: Path) -> int:
    return sum(tensor.nbytes for tensor in load_file(directory / "adapter_model.safetensors").values())


def check(seen: list[adapters.Seen]) -> None:
    """After every update the server computes what the trainer does, with the adapter and without; and these differ."""
    for each in seen:
        assert each.report.failed == {}
        assert each.adapted < BOUND and each.bare < BOUND, adapters.pretty(seen)
        assert each.moved > 0.1


def test_an_update_is_the_adapters_alone(models, servers, tmp_path):
    """Two workers. The server keeps what it has of prompts, and an update that is rehearsed throws its adapters out before each
    question. It has the weights of some other test, and gets those that the adapters are for with the first update."""
    first, _ = models("Llama")
    server = servers.get(first, 2)
    had = adapters.base_of(server)
    versions = [next(VERSIONS) for _ in range(2)]
    (seen,) = world.run(1, adapters.updates, first, {}, [server], versions, None, "auto", True, True, str(tmp_path))
    check(seen)
    thin = nbytes(tmp_path / "adapter")
    assert seen[1].report.bytes == thin
    base = sum(tensor.nbytes for tensor in load_file(f"{first}/model.safetensors").values())
    assert seen[0].report.bytes == thin + (0 if had == adapters.base_of(server) else base)


STRANGER = "base_model.model.model.layers.9.self_attn.q_proj"
LONE = "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"
PAIR = {f"{STRANGER}.lora_A.weight": torch.ones(3, 64), f"{STRANGER}.lora_B.weight": torch.ones(64, 3)}
REFUSED = {  # what is left out, what is in it beside, what its configuration says, what is told
    "a matrix that vLLM has not": ((), PAIR, {}, "1 of the adapter's 29 modules match no module of vLLM's model: model.layers.9"),
    "half a pair": ((LONE,), {}, {}, "have one of the two matrices alone: model.layers.0.mlp.up_proj"),
    "a rank above the server's": ((), {}, {"r": 64}, "LoRA rank 64 is greater than max_lora_rank 8"),
    "DoRA": ((), {}, {"use_dora": True}, "vLLM does not yet support DoRA"),
    "nonsense": ((), {}, {"r": "x"}, "the adapter was refused by vLLM"),
}


def test_a_broken_adapter_is_refused_by_name_and_a_whole_one_heals(models, servers, tmp_path):
    first, _ = models("Llama")
    server = servers.get(first, 2)
    made = adapter_files.make(tmp_path / "adapter", Path(first))
    config = json.loads((made / "adapter_config.json").read_text())
    for missing, extra, changed, told in REFUSED.values():
        senders = Senders(server, str(made), missing, extra, config | changed)
        senders.begin(1)
        for rank in (0, 3):
            senders.send(1, rank)
        senders.commit(1)
        problems = senders.problems()
        assert len(problems) == 2 and all(told in problem for problem in problems), problems
        with pytest.raises(ServerFailure, match="status 409"):
            senders.control.resume()
        senders.close()
        asked = {"prompts": [{"token_ids": [5], "sampling_params": {"max_tokens": 1}}]}
        assert httpx.post(f"{server.url}{ROUTE}", json=asked, headers=adapters.key(server), timeout=120).status_code == 503
    (seen,) = world.run(1, adapters.updates, first, {}, [server], [next(VERSIONS)])
    check(seen)
    asked["prompts"][0]["adapter"] = "other"
    answer = httpx.post(f"{server.url}{ROUTE}", json=asked, headers=adapters.key(server), timeout=120)
    assert answer.status_code == 400 and "this server has no adapter 'other'; it has policy" in answer.text


def test_a_server_without_room_for_adapters_takes_none(models, servers, tmp_path):
    first, _ = models("Qwen 3")
    made = adapter_files.make(tmp_path / "adapter", Path(first))
    senders = Senders(servers.get(first, 1), str(made), adapter={"r": 3})
    senders.begin(1)
    assert "this server was not started to hold any apart" in senders.problems()[0]
    senders.close()


@pytest.mark.acceptance
@pytest.mark.parametrize(("family", "trainer", "tensor", "transport", "lora"), GRID)
def test_ten_updates(models, tmp_path, family, trainer, tensor, transport, lora):
    model, _ = models(family)
    versions = [next(VERSIONS) for _ in range(10)]
    with one(model, tmp_path / "server", tensor, lora_rank=lora["rank"]) as server:
        arguments = (LAYOUTS[trainer], [server], versions, lora, transport, True, False, str(tmp_path))
        (seen, *_) = world.run(size(LAYOUTS[trainer]), adapters.updates, model, *arguments)
        check(seen)
        assert len(seen) == len(versions)
        assert {each.report.bytes for each in seen} == {nbytes(tmp_path / "adapter")}
        # whole weights, with the adapters merged, go to such a server too; then adapters of the model that it no longer has
        merged = str(tmp_path / "hf")
        ((report, difference),) = world.run(1, jobs.push, merged, {}, [server], next(VERSIONS))
        assert report.failed == {} and difference < BOUND
        (again,) = world.run(1, adapters.updates, model, {}, [server], [next(VERSIONS)], lora)
        check(again)
        assert again[0].report.bytes > 2 * nbytes(tmp_path / "adapter")
