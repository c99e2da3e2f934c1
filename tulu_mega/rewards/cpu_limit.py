"""A bound on the time that judging one reply takes, within the process that judges."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import NoReturn


class TooLong(BaseException):
    """The time is up. No Exception, so that libraries which catch those do not go on."""


@contextlib.contextmanager
def cpu_limit(seconds: float) -> Iterator[None]:
    """Raises :class:`TooLong` in the body once it has used so much CPU time.

    CPU time, so that verdicts do not depend on how busy the machine is. Signals reach the main thread alone: in other threads
    nothing is bounded, nor is a single long operation of the interpreter, such as a power of many digits.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: object) -> NoReturn:
        raise TooLong

    before = signal.signal(signal.SIGVTALRM, end)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds, 0.1)  # again, should a library swallow the first
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
