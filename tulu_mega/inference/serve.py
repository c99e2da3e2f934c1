"""`tulu-mega serve`: vLLM servers that a trainer on another node attaches to by `rollout.urls`."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import secrets
import shutil
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from tulu_mega.config import ServeSettings
from tulu_mega.errors import UserError
from tulu_mega.inference.adapters import checked, served
from tulu_mega.inference.addresses import key_from_environment
from tulu_mega.inference.for_run import pool, server_options
from tulu_mega.inference.interpreter import interpreter
from tulu_mega.launch.run_dir import locked
from tulu_mega.vllm_plugin.auth import KEY
from tulu_mega.vllm_plugin.gate import server_arguments

KEY_FILE = "key"


def serve(settings: ServeSettings) -> int:
    """Runs the servers until it is asked to end (SIGTERM, SIGINT) or one of them fails for good.

    Returns:
        The exit status: 128 + the signal's number.

    Raises:
        UserError: an address that others reach without a key, a port that is taken, a server that does not start.
    """
    key = key_from_environment()
    if key is None and not _is_loopback(settings.host):
        raise UserError(
            f"host = {settings.host!r} can be reached from other machines, and whoever reaches a server can run code in it: set "
            f"a key in {KEY} here and at the trainer, or leave host at 127.0.0.1"
        )
    options = server_options(settings.model, settings.rollout, None, tuple(server_arguments())).at(settings.host)
    for line in checked(settings.model.path, settings.adapter):
        print(line, file=sys.stderr, flush=True)
    for line in interpreter(settings.rollout.python, "rollout.python").notes:
        print(line, file=sys.stderr, flush=True)
    ports = _ports(settings.host, settings.port, settings.rollout.servers)
    with contextlib.ExitStack() as stack:
        directory = stack.enter_context(_directory(settings.run_dir))
        model = stack.enter_context(served(options.model, settings.adapter))
        options = replace(options, model=model.model, adapter=model.adapter, lora_rank=max(model.rank, settings.lora_rank or 0))
        asked = stack.enter_context(_asked_to_end())
        servers = pool(options, settings.rollout, directory, 0, ports=ports, key=key or _new_key(directory))
        print(f"Starting {settings.rollout.servers} vLLM server(s) on {settings.model.path} ...", file=sys.stderr, flush=True)
        with servers:
            addresses = servers.wait(asked)
            if addresses:
                if key is None:
                    print(f"The key is in {directory / KEY_FILE}, which only you can read.", file=sys.stderr)
                urls = ", ".join(f'"{_url(settings.host, port)}"' for port in ports)
                print(f"rollout.urls = [{urls}]", flush=True)
                servers.watch_until(asked)
    return 128 + asked.number


class _Asked(threading.Event):
    """Set when a signal asks this process to end."""

    number = signal.SIGTERM


@contextlib.contextmanager
def _asked_to_end() -> Iterator[_Asked]:
    asked = _Asked()

    def note(number: int, _frame: object) -> None:
        asked.number = number
        asked.set()

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _directory(given: str | None) -> Iterator[Path]:
    if given is not None:
        with locked(Path(given)):  # two would write one key file and one folder of records
            yield Path(given)
        return
    made = Path(tempfile.mkdtemp(prefix="tulu_mega_serve_"))
    yield made  # kept when a server fails: the logs are there
    shutil.rmtree(made, ignore_errors=True)


def _new_key(directory: Path) -> str:
    """A random key, in a file that nobody else can read."""
    key = secrets.token_urlsafe(32)
    file = directory / KEY_FILE
    try:
        directory.mkdir(parents=True, exist_ok=True)
        file.unlink(missing_ok=True)
        handle = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except OSError as error:
        raise UserError(f"{file} cannot be written: {error.strerror}; choose another run_dir") from None
    with os.fdopen(handle, "w", encoding="utf-8") as written:
        written.write(key)
    return key


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _ports(host: str, first: int, count: int) -> list[int]:
    """Ports that are free now: a server that is started again stays where it was."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with contextlib.ExitStack() as stack:
        ports = []
        for number in range(count):
            port = first + number if first else 0
            probe = stack.enter_context(socket.socket(family, socket.SOCK_STREAM))
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, port))
            except OverflowError:
                raise UserError(f"port = {first}: {count} servers need ports up to {port}, beyond 65535; begin lower") from None
            except OSError as error:
                raise UserError(
                    f"{host}, port {port}: cannot listen there: {error.strerror}; choose another host or port, or port = 0"
                ) from None
            ports.append(probe.getsockname()[1])
        return ports


def _url(host: str, port: int) -> str:
    if host in ("0.0.0.0", "::", ""):
        host = socket.gethostname()
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
