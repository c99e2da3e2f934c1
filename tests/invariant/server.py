"""A vLLM server from the command line, which several runs may have one after another."""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import Iterator
from pathlib import Path

from tests.invariant import commands

KEY = "TULU_MEGA_ROLLOUT_KEY"
URLS = "rollout.urls = "


@contextlib.contextmanager
def served(directory: Path, *flags: str) -> Iterator[tuple[list[str], dict[str, str]]]:
    """A server of the directory's model: flags and environment variables of the runs that attach to it.

    Args:
        flags: further ones of the server.

    Raises:
        AssertionError: it does not start, with what it says.
    """
    variables = {KEY: secrets.token_urlsafe(16)}
    arguments = ("--model.path", "model", "--model.dtype", "fp32", "--rollout.max_model_len", "96", *flags)
    server = commands.start(directory, "serve.txt", "serve", *arguments, **variables)
    try:
        yield ["--rollout.urls", _urls(server, directory / "serve.txt")], variables
    finally:
        server.terminate()
        try:
            server.wait(60)
        finally:
            server.kill()


def _urls(server: commands.Process, said: Path) -> str:
    ends = time.monotonic() + commands.LIMIT
    while time.monotonic() < ends and server.poll() is None:
        told = [line for line in said.read_text().splitlines() if line.startswith(URLS)]
        if told:
            return told[0].removeprefix(URLS)
        time.sleep(0.2)
    raise AssertionError(f"the server did not start: {said.read_text()[-3000:]}")
