"""Programs as data: right ones, cheating ones, and ones that try to get out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tulu_mega.rewards.classes import classes_asked

_REACHES = """
import ctypes

_libc = ctypes.CDLL(None, use_errno=True)


def call(number, *arguments):
    result = _libc.syscall(number, *arguments)
    if result < 0:
        raise OSError(ctypes.get_errno(), "call")
    return result


def reached():
BODY


_reached = ""
try:
    reached()
    _reached = "reached"
except BaseException as error:
    _why = f"{type(error).__name__}: {error}"


def f(x):
    return x * x if _reached else _why
"""


_ALL = """
def f(x):
    return x * x if _all else None
"""


@dataclass(frozen=True)
class Entry:
    """A program of the gallery, how it is judged, and what its zero may be counted as."""

    name: str
    program: str
    test: str | dict[str, str]
    prompt: str = ""
    kinds: frozenset[str] | None = None

    @property
    def reply(self) -> str:
        return f"```python\n{self.program}\n```"

    @property
    def needs_objects(self) -> bool:
        """Whether its test makes objects of the program's classes."""
        return isinstance(self.test, str) and bool(classes_asked(self.test))

    @property
    def job(self) -> dict[str, str]:
        return {"statement": self.test} if isinstance(self.test, str) else self.test


def read(name: str) -> list[Entry]:
    """The programs of a file."""
    text = Path(__file__).with_name(name).read_text(encoding="utf-8")
    return [_entry(part) for part in text.split("\n=== ")[1:]]


def escapes(victim: str) -> list[Entry]:
    """Programs that answer rightly only where they could do what they must not, for example to the file ``victim``."""
    found = []
    for entry in read("escapes.txt"):
        body = "\n".join(f"    {line}" for line in entry.program.replace("{victim}", victim).strip().split("\n"))
        found.append(Entry(entry.name, _REACHES.replace("BODY", body), entry.test))
    return found


def all_escapes(victim: str) -> Entry:
    """The same in one program: it answers rightly where any of them could."""
    parts = [entry.program + f"\nif _reached: _all.append({entry.name!r})" for entry in escapes(victim)]
    program = "_all = []\n" + "\n".join(parts) + _ALL
    return Entry("all escapes", program, "assert f(2) == 4")


def _unescaped(text: str) -> str:
    r"""The text with a new line for each ``\n``, and ``\n`` for each ``\\n``."""
    return text.replace("\\\\n", "\0").replace("\\n", "\n").replace("\0", "\\n")


def _entry(part: str) -> Entry:
    head, _, program = part.partition("\n---\n")
    name, *lines = head.split("\n")
    told = {key: _unescaped(value.strip()) for key, _, value in (line.partition(":") for line in lines if line)}
    test = told.get("test", "assert f(2) == 4 and f(3) == 9 and f(1) == 1")
    kinds = frozenset(told["kind"].split()) if told.get("kind") else None
    judged = {"input": told["input"], "output": told["output"]} if "output" in told else test
    return Entry(name, program, judged, told.get("prompt", ""), kinds)
