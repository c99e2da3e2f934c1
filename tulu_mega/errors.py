"""The exceptions that users see as a message instead of a traceback."""

from __future__ import annotations

from collections.abc import Iterable

HUNG = 124
"""Exit status of a rank that the watchdog ended: the status of timeout(1)."""
STATUSES = {
    0: "done",
    1: "a defect, or another rank was lost: the traceback above is that of the rank that failed",
    2: "something you can mend: each problem is a line `error: ...` on standard error",
    120: "standard output could not be written",
    HUNG: "a rank hung: the watchdog's report on standard error says where",
    129: "the terminal was closed before the command could end by itself (`RUN_DIR/logs/hangup.log`)",
    130: "interrupted by Ctrl-C; nothing was saved after the last checkpoint",
    137: "asked to end, and killed after `checkpoint.grace` seconds",
    141: "the program that read the output has ended (`tulu-mega ... | head`)",
    143: "asked to end by SIGTERM, SIGUSR1 or a closed terminal; a run that trains has saved, and the same command goes on",
}
"""Exit statuses of `tulu-mega` and what they mean. Any other is that of the rank that failed first: 128 + n where signal n ended
it."""


class UserError(Exception):
    """Something the user can mend: settings, data, a model directory, the environment.

    Every problem says what was got, what was expected and what to do. The command line prints
    all of them and exits with status 2.

    Args:
        problems: one message, or several that were found together.
    """

    def __init__(self, problems: str | Iterable[str]):
        told = [problems] if isinstance(problems, str) else problems
        self.problems: list[str] = [printable(each) for each in told]
        super().__init__("\n".join(self.problems))

    def __reduce__(self):  # crosses process boundaries (broadcast from rank 0, worker pools)
        return type(self), (self.problems,)


class Stopped(Exception):
    """A run was asked to end and did so after a step that it has saved: the same command goes on from there.

    Args:
        step: steps done.
    """

    status = 143
    """Exit status, whichever signal asked: that of a process which SIGTERM ended."""

    def __init__(self, step: int):
        self.step = step
        super().__init__(f"asked to end: stopped after step {step}, which is saved; the same command goes on from there")


def printable(text: str) -> str:
    """Text that a terminal shows and does not obey: control characters but line feeds and tabs, and characters that turn the
    direction of writing, as Python would escape them.

    What rows, settings, file names and models say reaches terminals through this function.
    """
    return text if text.isascii() and text.isprintable() else "".join(map(_shown, text))


def _shown(character: str) -> str:
    code = ord(character)
    obeyed = code < 0x20 or 0x7F <= code < 0xA0 or 0x202A <= code <= 0x202E or 0x2066 <= code <= 0x2069
    return repr(character)[1:-1] if obeyed and character not in "\n\t" else character


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint such as ``; did you mean 'lr'?``, empty when nothing is close."""
    import difflib

    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""
