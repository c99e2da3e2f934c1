"""What comes with a model of unknown origin and computes: chat templates and tokenizers, under limits of time and memory.

Jinja's sandbox keeps a template from files and Python, not from looping or from taking memory, and neither transformers nor vLLM
limits either. A thread cannot be stopped within a multiplication of texts, nor can memory be limited for a part of a process that
holds a model. So templates are rendered by a process of their own, one for each process that renders, which the kernel ends; an
exchange with it takes a tenth of a millisecond. It starts when it is first needed and ends when it is not asked for a minute.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import pickle
import signal
import struct
import subprocess
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tulu_mega.errors import UserError
from tulu_mega.outside.json_input import read_json_text

LENGTH = struct.Struct("<Q")
_MOST = 1 << 30
"""Most bytes of an answer."""


@dataclass(frozen=True)
class Limits:
    """What one piece of work may take."""

    seconds: float
    """seconds of processor time"""
    nbytes: int
    """bytes of memory beyond those of the process before its first work"""

    def __str__(self) -> str:
        return f"{self.seconds:g} s of processor time or {self.nbytes >> 20} MiB of memory"


TEMPLATE = Limits(10, 1 << 30)
"""Limits of a rendering. The slowest template that models are known to ship takes milliseconds."""
TOKENIZER = Limits(60, 4 << 30)
"""Limits of loading a tokenizer and tokenising some kilobytes. The largest vocabularies take 3 s and 1 GiB."""


class Refused(ValueError):
    """Raised with the error in which a piece of work ended."""


class Exceeded(Exception):
    """Raised when a piece of work takes more than its limits."""


class _Worker:
    """The process that works for this one."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0

    def do(self, work: str, limits: Limits, **arguments: Any) -> Any:
        """Return what a function of `limited_work` returns for these arguments.

        Raises:
            Refused: it raised something.
            Exceeded: it took more than its limits, or ended its process.
        """
        content = pickle.dumps((work, limits.seconds, limits.nbytes, arguments))
        with self._lock:
            told = self._told(content, limits) or self._told(content, limits)  # it may go just when it is asked
        if told is None:
            raise Exceeded("its process cannot be kept")
        if "exceeded" in told:
            raise Exceeded(f"it took more than {limits}")
        if "refused" in told:
            raise Refused(told["refused"])
        return told["done"]

    def _told(self, content: bytes, limits: Limits) -> dict[str, Any] | None:
        """Return the answer to a request; None where the process had ended because nobody asked for a minute.

        Raises:
            Exceeded: the process ended over it.
        """
        try:
            process = self._started()
            process.stdin.write(LENGTH.pack(len(content)) + content)
            process.stdin.flush()
            (length,) = LENGTH.unpack(_exactly(process.stdout, LENGTH.size))
            return read_json_text(_exactly(process.stdout, min(length, _MOST)))
        except (OSError, EOFError, ValueError):  # whatever it says after a template took it over is no answer
            if (status := self._ended()) == -signal.SIGALRM:
                return None
            if status == -signal.SIGPROF:
                raise Exceeded(f"it took more than {limits}") from None
            told = signal.Signals(-status).name if status < 0 else f"status {status}"
            raise Exceeded(f"its process ended by {told}; it may take {limits}") from None
        except BaseException:  # an answer to come would be taken for the next one's
            self.close()
            raise

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is not None and self._owner == os.getpid() and self._process.poll() is not None:
            self._ended()
        if self._process is None or self._owner != os.getpid():  # a fork of the process that started it has none
            inherited = {name: value for name, value in os.environ.items() if not name.startswith("TULU_MEGA_")}
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "tulu_mega.data.limited_work"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env={**inherited, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"},
                process_group=0,  # an interrupt from the terminal is for those who asked
            )
            self._owner = os.getpid()
        return self._process

    def _ended(self) -> int:
        """Exit status of the process, which is gone afterwards."""
        process, self._process = self._process, None
        if process is None:
            return 0
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=0.2)  # where its end was seen before its status is there
        process.kill()
        status = process.wait()
        for each in (process.stdin, process.stdout):
            with contextlib.suppress(OSError):
                each.close()
        return status

    @property
    def works(self) -> bool:
        """Whether there is a process."""
        return self._process is not None and self._owner == os.getpid() and self._process.poll() is None

    def close(self) -> None:
        """Ends the process."""
        if self._process is not None and self._owner == os.getpid():
            self._process.kill()
            self._ended()


_worker = _Worker()
atexit.register(_worker.close)


def rendered(template: str, arguments: Mapping[str, Any], marks: bool) -> tuple[str, list[tuple[int, int]]]:
    """A template's text, by transformers' own renderer, and the ranges of characters that it marks.

    Args:
        arguments: of transformers' ``render_jinja_template``.

    Raises:
        ValueError: the template raised something.
        UserError: it took more than `TEMPLATE`.
    """
    try:
        text, ranges = _worker.do("render", TEMPLATE, template=template, arguments=dict(arguments), marks=marks)
    except Exceeded as error:
        raise UserError(f"the tokenizer's chat template cannot be used: {error}; take the template 'tulu'") from None
    return text, [(start, end) for start, end in ranges]


def names(template: str) -> tuple[frozenset[str], frozenset[str]]:
    """Variables that a template's code names, and fields; not the text that it writes. None where it is no template.

    Raises:
        UserError: as `rendered`.
    """
    try:
        variables, fields = _worker.do("names", TEMPLATE, template=template)
    except Refused:  # it cannot be rendered either, which is told then
        return frozenset(), frozenset()
    except Exceeded as error:
        raise UserError(f"the tokenizer's chat template cannot be used: {error}; take the template 'tulu'") from None
    return frozenset(variables), frozenset(fields)


def tried(tokenizer: str) -> None:
    """Loads a tokenizer.json, cuts a text with it, and lets it go again.

    Raises:
        ValueError: it cannot be loaded, or takes more than `TOKENIZER`.
    """
    worked = _worker.works
    try:
        _worker.do("try_tokenizer", TOKENIZER, path=tokenizer)
    except Exceeded as error:
        raise ValueError(f"it cannot be used: {error}") from None
    finally:
        if not worked:  # a large vocabulary leaves much memory behind
            _worker.close()


def _exactly(stream: Any, count: int) -> bytes:
    content = stream.read(count)
    if len(content) < count:
        raise EOFError
    return content
