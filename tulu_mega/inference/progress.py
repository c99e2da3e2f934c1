"""Progress of answers, on standard error."""

from __future__ import annotations

import io
import sys

from tqdm import tqdm

_LOG_SECONDS = 30.0


def progress(what: str, total: int, done: int = 0, unit: str = "problem") -> tqdm:
    """A bar in a terminal; in a log file a line every half minute, since a file keeps every state of a bar.

    Args:
        what: is asked.
        total: of all there are.
        done: of them, before.
    """
    terminal = sys.stderr.isatty()
    return _Lines(
        total=total,
        initial=done,
        desc=what,
        unit=f" {unit}s",
        file=sys.stderr,
        dynamic_ncols=True,
        mininterval=0.5 if terminal else _LOG_SECONDS,
        miniters=1,
        leave=False,
        bar_format=None if terminal else "{desc}: {n_fmt} of {total_fmt}{unit} answered, {elapsed} gone, {remaining} left",
    )


class _Lines(tqdm):
    """A progress bar that prints its states as lines where standard error is no terminal."""

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        if sys.stderr.isatty():
            return super().display(msg, pos)
        if msg is None and self.n > self.initial:  # not at the start, nor when it is closed: those lines are the command's
            print(str(self), file=sys.stderr, flush=True)
        return True

    def close(self) -> None:
        if not sys.stderr.isatty():
            self.fp = io.StringIO()  # there is no bar to wipe away
        super().close()
