"""A bound on the time that judging one reply takes, within the process that judges."""

from __future__ import annotations

import contextlib
import math
import resource
import signal
import threading
from collections.abc import Iterator

_AGAIN_S = 0.1
_ends = [math.inf]
"""Ends of the limits that are in force, in CPU time of this process; each limit is nested in the one before."""


class TooLong(BaseException):
    """Raised when the time is up. It is a BaseException, so that libraries that catch Exception do not go on."""


@contextlib.contextmanager
def cpu_limit(seconds: float) -> Iterator[None]:
    """Raises :class:`TooLong` in the body once it has used so much CPU time. A nested limit gets at most the rest of the outer
    one.

    CPU time, so that verdicts do not depend on how busy the machine is. Signals reach the main thread alone: in other threads
    nothing is bounded, nor is a single long operation of the interpreter, such as a power of many digits.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    if _used() >= _ends[-1]:
        raise TooLong
    bounded = True

    def end(number: int, frame: object) -> None:
        if bounded:
            raise TooLong

    signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    before = signal.signal(signal.SIGVTALRM, end)
    _ends.append(min(_ends[-1], _used() + seconds))
    try:
        try:
            _ring()
            yield
        finally:
            bounded = False
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        _ends.pop()
        signal.signal(signal.SIGVTALRM, before)
        if _ends[-1] < math.inf:
            _ring()


def _ring() -> None:
    """Set the timer to the innermost limit's end, and to repeat in case a library swallows the first signal."""
    signal.setitimer(signal.ITIMER_VIRTUAL, max(_ends[-1] - _used(), 0.001), _AGAIN_S)


def _used() -> float:
    """Return the CPU time that this process itself has used in user mode."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_utime
