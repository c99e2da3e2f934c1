"""The thread that writes checkpoints while training goes on."""

from __future__ import annotations

import threading
from pathlib import Path
from types import SimpleNamespace

import torch

from tulu_mega.platforms import Platform
from tulu_mega.train.saver import Saver


def test_it_works_on_its_ranks_gpu(monkeypatch):
    """A thread begins with GPU 0, and would take memory there."""
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: chosen.append((device, threading.current_thread().name)))
    engine = SimpleNamespace(platform=Platform(torch.device("cuda", 3), "nccl"))
    saver = Saver({"model": engine}, Path(), 1, "reshardable", asynchronous=True)
    saver._thread.submit(int).result()
    assert chosen == [(torch.device("cuda", 3), "checkpoint_0")]
