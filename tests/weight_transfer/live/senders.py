"""Trainer ranks reduced to what they send: processes without a model, which may send what no trainer would."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from tulu_mega.weight_transfer.control import ServerControl
from tulu_mega.weight_transfer.protocol import (
    Expected,
    begin_message,
    bucket_message,
    checksum,
    commit_message,
    plan_buckets,
    view,
)
from tulu_mega.weight_transfer.server import ServerAddress
from tulu_mega.weight_transfer.transports import named


class Senders:
    """Two of them: rank 0 has the first half of the tensors, rank 3 the others.

    Args:
        tensors: what is sent.
        model: directory, of adapters alone too.
        left_out: tensors that no manifest mentions.
        extra: tensors sent beside.
        adapter: of adapters, the content of adapter_config.json.
    """

    def __init__(
        self,
        server: ServerAddress,
        model: str,
        left_out: tuple[str, ...] = (),
        extra: dict[str, Tensor] | None = None,
        adapter: dict[str, Any] | None = None,
    ):
        self._adapter = adapter
        self.control = ServerControl(server.url, server.key, 60)
        (file,) = Path(model).glob("*.safetensors")
        self.tensors = {name: tensor for name, tensor in load_file(file).items() if name not in left_out} | (extra or {})
        half = len(self.tensors) // 2
        self.manifest = {
            name: Expected(tuple(tensor.shape), "float32", 0 if at < half else 3)
            for at, (name, tensor) in enumerate(self.tensors.items())
        }
        self.boxes = {rank: named("shm").outbox(2**20, torch.device("cpu"), 30) for rank in (0, 3)}
        workers = self.control.world_size()
        endpoints = {str(rank): box.endpoint(server.url, workers) for rank, box in self.boxes.items()}
        self.control.init_weight_transfer_engine({"endpoints": endpoints, "timeout": 30})

    def begin(self, version: int) -> None:
        self.control.pause()
        self.control.start_weight_update()
        self.control.update_weights(begin_message(version, self.manifest, True, self._adapter))

    def send(self, version: int, rank: int, names: list[str] | None = None, flip: str | None = None) -> None:
        """One sender's tensors, or some of them.

        Args:
            flip: a tensor of which a bit changes on its way.
        """
        names = names or [name for name, each in self.manifest.items() if each.sender == rank]
        for bucket in plan_buckets(rank, names, self.manifest, 2**20):
            buffer = self.boxes[rank].buffer(bucket.slot)
            for place in bucket.places:
                view(buffer, place, self.manifest[place.name]).copy_(self.tensors[place.name])
                if place.name == flip:
                    buffer[place.offset + 5] ^= 1
            self.control.update_weights(bucket_message(version, bucket))

    def commit(self, version: int) -> None:
        self.control.update_weights(commit_message(version, {name: checksum(each) for name, each in self.tensors.items()}))

    def problems(self) -> list[str]:
        return [problem for worker in self.control.weights_status() for problem in worker["problems"]]

    def close(self) -> None:
        self.control.close()
        for box in self.boxes.values():
            box.close()


def send_half(server: ServerAddress, model: str, pipe: Connection) -> None:
    """What one of two senders sends, and then nothing, for ever."""
    senders = Senders(server, model)
    senders.begin(4)
    senders.send(4, 0)
    pipe.send("half")
    multiprocessing.Event().wait()


def announce(server: ServerAddress, model: str, pipe: Connection) -> None:
    """Over gloo: says that a bucket comes, and sends nothing."""
    senders = Senders(server, model)
    box = named("gloo").outbox(2**20, torch.device("cpu"), 60)
    endpoint = box.endpoint(server.url, senders.control.world_size())
    with ThreadPoolExecutor() as aside:
        attaching = aside.submit(box.connect, server.url)
        senders.control.init_weight_transfer_engine({"endpoints": {"0": endpoint}, "timeout": 60})
        attaching.result()
        senders.manifest = {name: replace(each, sender=0) for name, each in senders.manifest.items()}
        senders.begin(10)
        (bucket, *_) = plan_buckets(0, list(senders.manifest), senders.manifest, 2**20)
        pipe.send("announced")
        senders.control.update_weights(bucket_message(10, bucket))
