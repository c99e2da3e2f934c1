"""The signal to stop: sent to any rank, it ends all of them after the same step, with a checkpoint of that step."""

from __future__ import annotations

import signal

import torch
import torch.distributed as dist

from tulu_mega.launch.reporting import ASKS, Terminal, ignored


class StopSignal:
    """While entered, notes the signals that ask this process to end, instead of ending it at once.

    Args:
        device: the device of the ranks' collectives.
    """

    def __init__(self, device: torch.device):
        self._device, self.noted = device, False

    def __enter__(self) -> StopSignal:
        self._terminal = Terminal()
        taken = [number for number in ASKS if number != signal.SIGHUP or not ignored(number)]
        self._before = {number: signal.signal(number, self._note) for number in taken}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def received(self) -> bool:
        """Whether any rank received a signal. A collective: every rank calls it at the end of a step and gets the same."""
        noted = torch.full((), int(self.noted), device=self._device)  # torch.tensor would wait for the device
        dist.all_reduce(noted, dist.ReduceOp.MAX)
        return bool(noted.item())

    def _note(self, number: int, _frame: object) -> None:
        self.noted = True
        if number == signal.SIGHUP:
            self._terminal.closed()
