"""Being asked to end: a signal to any rank ends all of them after the same step, with a checkpoint of it."""

from __future__ import annotations

import signal

import torch
import torch.distributed as dist

from tulu_mega.launch.reporting import ASKS


class Ending:
    """While it is entered the signals do not end this process; they are noted, and met where a step ends.

    Args:
        device: where the ranks' collectives are.
    """

    def __init__(self, device: torch.device):
        self._device, self._noted = device, False

    def __enter__(self) -> Ending:
        self._before = {number: signal.signal(number, self._note) for number in ASKS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def asked(self) -> bool:
        """Whether any rank was asked; the same on every rank, all of which call it where a step ends."""
        noted = torch.tensor(int(self._noted), device=self._device)
        dist.all_reduce(noted, dist.ReduceOp.MAX)
        return bool(noted.item())

    def _note(self, _number: int, _frame: object) -> None:
        self._noted = True
