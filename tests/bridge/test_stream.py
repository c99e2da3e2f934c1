"""A sharded model as a stream of whole Hugging Face tensors: every byte of the files, stage by stage, in vLLM's order."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.lib import families, jobs, world
from tests.lib.layouts import LAYOUTS, size
from tulu_mega.bridge.stream import LiveWeights
from tulu_mega.config import RolloutSettings
from tulu_mega.weight_transfer.attach import Connection, attach
from tulu_mega.weight_transfer.protocol import checksum
from tulu_mega.weight_transfer.push import fill_and_send

pytestmark = pytest.mark.ranks


def streamed(directory: str, layout: dict[str, Any], dtype: str) -> tuple[Any, Any, Any] | None:
    """Metadata and names of this rank's stage, and each tensor's checksum in each pass; None beside the first replica."""
    with jobs.session(directory, layout) as made:
        rollout = RolloutSettings(dtype=dtype)
        connection = attach(made.sender(rollout), [], rollout)
        weights = connection.sender.weights
        found = None
        if weights is not None:
            sums = [
                {name: whole if whole is None else checksum(whole) for name, whole in weights},
                filled(made.topology.tensor_rank == 0, weights),
                filled_together(made.topology.tensor_rank == 0, weights),
                *(sent(connection, whole) for whole in (False, True)),
            ]
            meta = [(each.name, str(each.dtype), each.shape) for each in weights.metadata()]
            found = meta, weights.held_names(), sums
        connection.close()
        return found


def filled(receives: bool, weights: LiveWeights) -> dict[str, str | None]:
    """Each tensor's checksum after memory that was there before was filled with it."""
    sums: dict[str, str | None] = {}
    shapes = {each.name: (each.shape, each.dtype) for each in weights.metadata()}
    for name in weights.held_names():
        if not receives:
            weights.fill(name, None)
            sums[name] = None
            continue
        shape, dtype = shapes[name]
        whole = torch.full(shape, float("nan"), dtype=dtype)
        weights.fill(name, whole)
        sums[name] = checksum(whole)
    return sums


def sent(connection: Connection, whole_buckets: bool) -> dict[str, str | None]:
    """What the sender would tell its servers of the bytes in its buckets, filled tensor by tensor or, as on GPUs, as a whole."""
    checksums, _ = fill_and_send(replace(connection, whole_buckets=whole_buckets), connection.streams.every, 1, {})
    return dict.fromkeys(connection.sender.weights.held_names()) | checksums


def filled_together(receives: bool, weights: LiveWeights) -> dict[str, str | None]:
    """The same, of buckets of seven tensors; twice, so that what is planned at first is used again."""
    names = weights.held_names()
    made = {each.name: each for each in weights.metadata()}
    sums: dict[str, str | None] = {}
    for at in [*range(0, len(names), 7)] * 2:
        part = names[at : at + 7]
        wholes = [torch.empty(made[name].shape, dtype=made[name].dtype).fill_(torch.nan) if receives else None for name in part]
        weights.fill_together(part, wholes)
        sums |= {name: whole if whole is None else checksum(whole) for name, whole in zip(part, wholes, strict=True)}
    return sums


@pytest.mark.parametrize(
    ("family", "layout", "dtype"),
    [
        ("Qwen 3", "TP2xPP2", "fp32"),  # tied
        ("OLMo 2", "PP2xVPP2", "bf16"),
        ("Llama", "DP2xTP2", "fp32"),
        ("Llama", "TP2xCP2", "bf16"),
    ],
)
def test_the_stream_is_the_files(tmp_path, family, layout, dtype):
    model = str(tmp_path / "model")
    world.run(1, families.make_language_model, model, family)
    ranks = world.run(size(LAYOUTS[layout]), streamed, model, LAYOUTS[layout], dtype)
    kind = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    files = {name: tensor.to(kind) for name, tensor in load_file(f"{model}/model.safetensors").items()}
    want = {name: checksum(tensor) for name, tensor in files.items()}
    senders = [found for found in ranks if found is not None]
    replicas = LAYOUTS[layout].get("data", 1) * LAYOUTS[layout].get("context", 1)
    assert len(senders) == len(ranks) // replicas
    metadata = senders[0][0]
    assert all(found[0] == metadata for found in senders)
    assert {name: shape for name, _, shape in metadata} == {name: tuple(tensor.shape) for name, tensor in files.items()}
    assert {type_ for _, type_, _ in metadata} == {str(kind)}
    order = {name: at for at, (name, _, _) in enumerate(metadata)}
    for _, held, sums in senders:
        assert held == sorted(held, key=order.get)
        for each in sums:
            assert list(each) == held
    for once in range(5):
        whole = [(name, value) for _, _, sums in senders for name, value in sums[once].items() if value is not None]
        assert len(whole) == len(want)
        assert dict(whole) == want
