"""A plugin of vLLM for tests: workers sleep until a message comes, instead of polling for a second after each.

vLLM's workers take a core each while they poll. Tests share two cores among servers, trainers and each other; there the
polling of two workers was half of all the time. What a server answers does not change.
"""

from __future__ import annotations

POLLS_S = 0.001


def register() -> None:
    """vLLM calls this in each of its processes, before any queue of messages is made."""
    from vllm.distributed.device_communicators.shm_broadcast import SpinCondition

    defaults = SpinCondition.__init__.__defaults__
    if defaults != (1,):
        raise RuntimeError(f"vLLM's SpinCondition polls for {defaults} s by default; tests expect (1,), see {__file__}")
    SpinCondition.__init__.__defaults__ = (POLLS_S,)
