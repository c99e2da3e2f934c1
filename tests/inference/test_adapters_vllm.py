"""vLLM with an adapter beside the model's weights, against transformers on the merged model."""

from __future__ import annotations

import json
from pathlib import Path

import httpx
import pytest

from tests.lib import adapter_files, families
from tests.weight_transfer.live.adapters import key
from tulu_mega.convert.run import run as convert
from tulu_mega.convert.settings import ConvertSettings
from tulu_mega.inference import adapters
from tulu_mega.inference.command_line import ADAPTER, ServerOptions, core_shares
from tulu_mega.inference.offline import Generator
from tulu_mega.inference.pool import ServerPool
from tulu_mega.inference.sampling import Sampling
from tulu_mega.vllm_plugin.gate import server_arguments

pytestmark = [pytest.mark.servers, pytest.mark.acceptance]

pytest.importorskip("vllm")

PROMPTS = [[5, 6, 7], [40, 41, 42, 43, 44, 45], [300]]
TOKENS = 8


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """MODEL, an adapter of it and both merged, in directories of these names."""
    root = tmp_path_factory.mktemp("adapters")
    families.make_language_model(str(root / "model"), "Llama", 32)
    adapter_files.make(root / "adapter", root / "model")
    convert(
        ConvertSettings(
            source=str(root / "model"), output=str(root / "merged"), to="hf", adapter=str(root / "adapter"), workers=1
        )
    )
    return root


def test_offline(made):
    with (
        adapters.served(str(made / "model"), str(made / "adapter")) as model,
        Generator(model.model, max_model_len=64, adapter=model.adapter, adapter_rank=model.rank) as vllm,
    ):
        answers = [each.token_ids for (each,) in vllm(PROMPTS, Sampling(max_tokens=TOKENS))]
    merged, base = (families.greedy(str(made / name), PROMPTS, TOKENS) for name in ("merged", "model"))
    assert answers == merged != base


def test_served_beside_the_model_itself(made, tmp_path):
    options = ServerOptions(
        str(made / "model"), max_model_len=64, lora_rank=3, adapter=str(made / "adapter"), extra=tuple(server_arguments())
    )
    merged, base = (families.greedy(str(made / name), PROMPTS, TOKENS) for name in ("merged", "model"))
    with ServerPool(options, tmp_path, cores=core_shares([0], 1, 1), restarts=0) as pool:
        (server,) = pool.wait()
        sampling = Sampling(max_tokens=TOKENS)
        body = [
            {"token_ids": ids, "sampling_params": sampling.parameters(0), **name}
            for ids in PROMPTS
            for name in ({"adapter": ADAPTER}, {})
        ]
        answer = httpx.post(f"{server.url}/inference/tulu_mega/batch", json={"prompts": body}, headers=key(server), timeout=120)
        told = {each["place"]: each["choices"][0]["token_ids"] for each in map(json.loads, answer.text.splitlines())}
        assert [told[at] for at in range(6)] == [each for pair in zip(merged, base, strict=True) for each in pair]
        # vLLM's own route has it as a model of that name
        one = {"model": ADAPTER, "token_ids": PROMPTS[1], "sampling_params": {"max_tokens": TOKENS, "temperature": 0}}
        answer = httpx.post(f"{server.url}/inference/v1/generate", json=one, headers=key(server), timeout=120)
        assert answer.json()["choices"][0]["token_ids"] == merged[1]
