"""FP8 rollouts from a running trainer: the stream is bit by bit what vLLM quantizes, and vLLM's model takes it."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.lib import jobs, world
from tests.lib.layouts import LAYOUTS, size
from tulu_mega.bridge import fp8
from tulu_mega.bridge.rules import padded_vocab
from tulu_mega.bridge.shards import exportable
from tulu_mega.bridge.stream import outgoing
from tulu_mega.config import RolloutSettings
from tulu_mega.weight_transfer.attach import attach
from tulu_mega.weight_transfer.protocol import checksum

ORACLE = Path(__file__).parents[1] / "lib/oracles/fp8.py"


def make_model(directory: str) -> None:
    """Heads of a block's rows, so that attention's shards are whole blocks under TP 2; a feed-forward whose shards are not."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=300, hidden_size=256, intermediate_size=384, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=128, max_position_embeddings=64, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[:128, :128] = 0  # a block of zeros
        model.model.layers[1].self_attn.o_proj.weight.mul_(100)
    model.bfloat16().save_pretrained(directory)


def streamed(directory: str, layout: dict[str, Any], dtype: str) -> dict[str, Any] | None:
    """Of this rank's stage: metadata, what it yields in two ways, what it was planned to send; None beside the first replica."""
    with jobs.session(directory, layout, dtype) as made:
        rollout = RolloutSettings(dtype="bf16", quantization="fp8")
        connection = attach(made.sender(rollout), [], rollout)
        weights, engine, place = connection.sender.weights, made.engine, made.topology
        held = [parameter for chunk in engine.chunks for _, parameter in exportable(chunk)]
        before = [checksum(parameter.detach()) for parameter in held]
        tensors = dict(weights)
        whole = {meta.name: torch.zeros(meta.shape, dtype=meta.dtype) for meta in weights.metadata()}
        for name in weights.held_names():
            weights.fill(name, whole[name] if place.tensor_rank == 0 else None)
        out = outgoing(made.shard(engine.hf.to_dict()), torch.bfloat16, fp8=True)
        found = {
            "metadata": [(meta.name, str(meta.dtype), tuple(meta.shape)) for meta in weights.metadata()],
            "held": weights.held_names(),
            "planned": [(name, str(each.dtype), tuple(each.shape)) for name, each in out.items()],
            "sent": [sum(sum(each.sent[rank : rank + 1]) for each in out.values()) for rank in range(place.tensor)],
            "lead": place.tensor_rank == 0,
            "same": [checksum(parameter.detach()) for parameter in held] == before,
            "tensors": {name: bytes_of(value) for name, value in tensors.items() if value is not None},
            "filled": {name: bytes_of(whole[name]) for name in weights.held_names()},
        }
        connection.close()
        return found


def bytes_of(tensor: torch.Tensor):
    return tensor.contiguous().view(torch.uint8).numpy() if tensor.element_size() == 1 else tensor.float().numpy()


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    directory = str(tmp_path_factory.mktemp("fp8") / "model")
    world.run(1, make_model, directory)
    return directory


@pytest.fixture(scope="module")
def streams(model):
    """What the ranks of a layout tell, asked once."""
    return functools.cache(lambda layout, dtype: world.run(size(LAYOUTS[layout]), streamed, model, LAYOUTS[layout], dtype))


@pytest.fixture(scope="module")
def oracle(model, streams, tmp_path_factory) -> dict[str, Any]:
    """vLLM's words on the stream of one rank."""
    pytest.importorskip("vllm")
    (alone,) = streams("TP1", "bf16")
    directory = tmp_path_factory.mktemp("oracle")
    types = {name: kind for name, kind, _ in alone["metadata"]}
    stream = {name: torch.from_numpy(value) for name, value in alone["tensors"].items()}
    stream = {name: value.bfloat16() if types[name] == "torch.bfloat16" else value for name, value in stream.items()}
    torch.save(stream, directory / "stream.pt")
    words = [sys.executable, str(ORACLE), model, str(directory / "stream.pt"), str(directory / "told.pt")]
    environment = os.environ | {"VLLM_LOGGING_LEVEL": "ERROR", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-4000:]
    return torch.load(directory / "told.pt")


@pytest.mark.parametrize(("layout", "dtype"), [("TP1", "bf16"), ("TP2xPP2", "bf16"), ("TP2", "fp32")])
def test_the_stream_is_what_vllm_quantizes(model, streams, oracle, layout, dtype):
    ranks = streams(layout, dtype)
    files = load_file(f"{model}/model.safetensors")
    metadata = ranks[0]["metadata"]
    assert all(found["metadata"] == metadata and found["same"] for found in ranks)  # the trainer's weights are as they were
    names = [name for name, _, _ in metadata]
    assert len(set(names)) == len(names) == len(files) + 2 * 7  # scales of seven matrices in each of two layers
    for at, name in enumerate(names):
        if fp8.is_quantized(name):
            assert names[at + 1] == f"{name}_scale_inv"
    for found in ranks:
        assert found["planned"] == [line for line in metadata if line[0] in found["held"]]
    for way in ("tensors", "filled"):
        got = {name: value for found in ranks if found["lead"] for name, value in found[way].items()}
        assert got.keys() == set(names)
        for name, value in got.items():
            want = oracle["tensors"].get(name, files.get(name))
            want = want if want.dtype == torch.uint8 else want.float()
            assert torch.equal(torch.from_numpy(value), want), (way, name)


def test_whole_blocks_travel_as_bytes(streams):
    """Attention's shards go quantized, a byte each and the scales; the feed-forward's as they are."""
    lead, other = streams("TP2", "fp32")
    attention = 2 * (256 * 256 + 2 * 128 * 256 + 256 * 256)  # on a rank: q, k and v, o, in two layers
    blocks = attention // 128**2
    feed_forward = 2 * 3 * 192 * 256
    embeddings = 2 * (300 - padded_vocab(300, 2) // 2) * 256  # the second rank's rows of embedding and head
    assert lead["sent"] == other["sent"]
    assert other["sent"][1] == attention + 4 * blocks + 4 * feed_forward + 2 * embeddings


def test_vllms_model_takes_it(oracle):
    """By our worker's engine and vLLM's layerwise reload; fused matrices hold numbers and scales of their parts, end to end."""
    assert oracle["problems"] == []
    nothing, half = oracle["refused"][:8], oracle["refused"][8:]  # four fused matrices in each of two layers
    assert all("weight_scale_inv got nothing" in each for each in nothing)
    assert len(half) == 8 and all("the manifest lacks what it is made of" in each for each in half)
    whole = oracle["tensors"]
    parameters = {name.removeprefix("vllm "): value for name, value in whole.items() if name.startswith("vllm ")}
    for layer in ("model.layers.0", "model.layers.1"):
        for fused, parts in {
            "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
            "self_attn.o_proj": ("self_attn.o_proj",),
            "mlp.down_proj": ("mlp.down_proj",),
        }.items():
            for kind in ("weight", "weight_scale_inv"):
                want = torch.cat([whole[f"{layer}.{part}.{kind}"] for part in parts])
                assert torch.equal(parameters[f"{layer}.{fused}.{kind}"], want), (layer, fused, kind)
