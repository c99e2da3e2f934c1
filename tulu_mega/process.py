"""What many imported modules cost a process: garbage collections while they are imported, and being taken apart at its end.

``TULU_MEGA_PLAIN=1`` in the environment leaves both to Python, and turns off what lies in `tulu_mega.platforms.cpu_speed`.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import os
import sys
import threading
from collections.abc import Iterator
from typing import NoReturn

PLAIN = "TULU_MEGA_PLAIN"
"""Environment variable: 1 turns off all that only makes processes and CPUs faster."""


def plain() -> bool:
    """Whether `PLAIN` is set."""
    return os.environ.get(PLAIN) == "1"


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """No garbage is collected while modules are imported, and what is there afterwards is looked at again when the process ends.
    Where none was imported all stays as it is.

    Of the 13 s of CPU that the imports of a rank took (Zen 3), 2.5 were collections, which found next to nothing.
    """
    if plain():
        yield
        return
    enabled, modules = gc.isenabled(), len(sys.modules)
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
        if len(sys.modules) != modules:
            _unfreeze_at_the_end()
            gc.freeze()


@functools.cache
def _unfreeze_at_the_end() -> None:
    """Extension modules complain of what is left then. That it was called already is told by the cache at once, and by
    `gc.get_freeze_count` after a walk over all objects."""
    atexit.register(gc.unfreeze)


class Collections:
    """Garbage collections at the same steps on all ranks, and at no other time while entered.

    A collection stops its rank, and in the next collective all ranks wait for it; at the same step they stop together.

    Args:
        every: steps between collections. Few objects of a step are in cycles, which alone need one.
    """

    def __init__(self, every: int = 50):
        self._every, self._enabled = every, False

    def __enter__(self) -> Collections:
        self._enabled = gc.isenabled() and not plain()
        if self._enabled:
            gc.collect()
            gc.disable()
        return self

    def __exit__(self, *_: object) -> None:
        if self._enabled:
            gc.enable()

    def after_step(self, done: int) -> None:
        """Collect, if it is time.

        Args:
            done: finished steps; the same on every rank.
        """
        if self._enabled and done % self._every == 0:
            gc.collect()


def leave(status: int) -> NoReturn:
    """Ends the process as `sys.exit` does from the main thread, except that the interpreter is not taken apart first.

    Taking it apart takes 2 s of CPU where a rank's modules are imported. Threads are waited for, what is registered with `atexit`
    is done, output is written; where it cannot be the status becomes Python's own for that, 120, and 141 where nobody reads it.
    A process that has used CUDA ends as always: profilers write what they hold when libraries are unloaded.
    """
    if plain() or ("torch" in sys.modules and sys.modules["torch"].cuda.is_initialized()):
        sys.exit(status)
    threading._shutdown()  # as `multiprocessing` ends the processes that it starts
    atexit._run_exitfuncs()
    try:
        sys.stdout.flush()
    except BrokenPipeError:  # nobody reads it any more
        status = status or 141
    except OSError as error:
        print(f"error: standard output could not be written: {error.strerror}", file=sys.stderr)
        status = status or 120
    with contextlib.suppress(OSError, ValueError):  # it may be closed
        sys.stderr.flush()
    os._exit(status)
