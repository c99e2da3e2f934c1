"""When a sender's buffers are full."""

from __future__ import annotations

import torch

from tulu_mega.weight_transfer.protocol import SLOTS


class Fills:
    """For each buffer on a GPU, when it is full; on a CPU it is when the thread that fills it says so."""

    def __init__(self, device: torch.device):
        self._device = device
        self._events = [torch.cuda.Event(blocking=True) for _ in range(SLOTS)] if device.type == "cuda" else []

    def note(self, slot: int) -> None:
        """What was asked of the GPU until now is part of it."""
        if self._events:
            self._events[slot].record(torch.cuda.current_stream(self._device))

    def wait(self, slot: int) -> None:
        """The host waits, in whichever thread."""
        if self._events:
            with torch.cuda.device(self._device):  # a new thread is on GPU 0, where it would leave a context
                self._events[slot].synchronize()
