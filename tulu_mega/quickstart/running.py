"""What a story of several commands is run with: everything appears when it is complete, and what exists is not done again."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tulu_mega.errors import UserError

STOP_SECONDS = 60
"""A stage may take to end when it is told to."""


def claim(file: Path, settings: Mapping[str, Any]) -> None:
    """Writes down what the file's directory is made with, so that nothing made with other settings is taken for this.

    Raises:
        UserError: the directory holds the same with other settings.
    """
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        once(file, lambda: whole(file, json.dumps(settings) + "\n"))
        return
    found = json.loads(file.read_text(encoding="utf-8"))
    if found != settings:
        what = f"a {file.stem} with {found}, not {dict(settings)}"
        raise UserError(f"{file.parent} holds {what}; give another --run_dir or remove it")


def once(path: Path, make: Callable[[], None]) -> None:
    """Makes what is not there. Everything here appears when it is complete: what exists is whole."""
    if not path.exists():
        make()


def whole(file: Path, text: str) -> None:
    """Writes a file that appears when it is complete."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(file)


def stage(command: str, directory: Path, settings: str, name: str | None = None) -> None:
    """Runs a command of the recipe; what is exported already is not trained again.

    Args:
        settings: as TOML, with a run directory of `directory / name`.
        name: the command's own when None.

    Raises:
        UserError: the command failed.
    """
    name = name or command
    if (directory / name / "hf").exists():
        return
    file = directory / f"{name}.toml"
    file.write_text(settings, encoding="utf-8")
    tulu_mega(f"see above and {directory / name / 'logs'}", command, str(file))


def tulu_mega(hint: str, *arguments: str) -> None:
    """Runs a command in a process of its own.

    Args:
        hint: where to look if it fails.

    Raises:
        UserError: it failed.
        KeyboardInterrupt: it was interrupted.
    """
    status = ran([sys.executable, "-m", "tulu_mega", *arguments])
    if status == 130:
        raise KeyboardInterrupt
    if status != 0:
        raise UserError(f"tulu-mega {arguments[0]} ended with status {status}; {hint}, then run the same again")


def ran(command: list[str]) -> int:
    """A command's exit status. Whatever ends us meanwhile ends the command too, in order: it has ranks and servers to end."""
    process = subprocess.Popen(command)
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        return process.wait()
    except BaseException:
        process.terminate()
        try:
            process.wait(STOP_SECONDS)
        finally:
            process.kill()
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
