"""Where the servers are: what the launcher writes and the ranks read, in RUN_DIR/servers.

``server_N.json`` is the launcher's word on its server N. ``restart_*`` is a rank's request to start one again: it stands until
the address in it is no longer the server's. What was asked of servers of other launchers (`rollout.urls`) is no file: the process
that asked remembers it.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import httpx

from tulu_mega.config.rollout import RolloutSettings
from tulu_mega.errors import UserError
from tulu_mega.json_input import read_json_text
from tulu_mega.vllm_plugin.auth import ABOUT, KEY, RESTART
from tulu_mega.weight_transfer.server import ServerAddress

FOLDER = "servers"
POLL_SECONDS = 0.1
REMOTE_POLL_SECONDS = 1.0
REPLY_SECONDS = 10.0
SLACK_SECONDS = 10.0
"""How much longer ranks wait than the launcher, which knows better what went wrong."""
_ASKED: set[tuple[str, int]] = set()
"""URL and incarnation of servers that are not this run's own and that this process has asked to end."""


@dataclass(frozen=True)
class ServerRecord:
    """The launcher's word on one of its servers."""

    state: Literal["starting", "ready", "failed"]
    url: str = ""
    pid: int = 0
    incarnation: int = 0
    why: str = ""
    """it failed, with the tail of its log"""


def write_record(folder: Path, number: int, record: ServerRecord) -> None:
    """Puts a record where ranks read it, whole or not at all."""
    file = folder / f"server_{number}.json"
    part = file.with_suffix(".part")
    folder.mkdir(parents=True, exist_ok=True)  # somebody may have removed it meanwhile
    part.write_text(json.dumps(asdict(record)), encoding="utf-8")
    part.replace(file)


def read_record(folder: Path, number: int) -> ServerRecord | None:
    """None when the launcher has not said anything yet."""
    try:
        told = read_json_text((file := folder / f"server_{number}.json").read_text(encoding="utf-8"))
        return ServerRecord(**told)
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        raise UserError(f"{file}: is no record of a server ({error}); start the run again") from None


def key_from_environment() -> str | None:
    return os.environ.get(KEY) or None


def attached(settings: RolloutSettings, run_dir: Path) -> list[ServerAddress]:
    """The servers, once all of them answer: those the launcher started, or those of `rollout.urls`.

    A server that was asked to restart counts only when it has.

    Raises:
        UserError: one failed (with the tail of its log), does not answer within `rollout.start_timeout`, or nobody started any.
    """
    folder = Path(run_dir, FOLDER)
    if settings.urls:
        return _remote(settings)
    key = key_from_environment()
    if key is None:
        raise UserError(
            "no vLLM servers: ranks under torchrun do not start them; give rollout.urls = the URLs of servers started by "
            f"tulu-mega serve and their key in {KEY}, or start without torchrun"
        )
    found: list[ServerAddress] = []

    def ready() -> bool:
        records = [record for number in range(settings.servers) if (record := read_record(folder, number)) is not None]
        for record in records:
            if record.state == "failed":
                raise UserError(record.why)
        found[:] = [ServerAddress(record.url, key, record.incarnation) for record in records if record.state == "ready"]
        # one that died a moment ago is still on record
        return (
            len(found) == settings.servers
            and all(restart_asked(folder, each.url, each.incarnation) is None for each in found)
            and all(_ask(each.url, key) == each for each in found)
        )

    _wait(ready, longest_wait(settings), POLL_SECONDS, lambda: f"{len(found)} of {settings.servers} are")
    return found


def longest_wait(settings: RolloutSettings) -> float:
    """Seconds that `attached` waits: of our own servers a restart may be under way when it begins, so that these start twice."""
    return settings.start_timeout if settings.urls else 2 * settings.start_timeout + SLACK_SECONDS


def ask_restart(run_dir: Path, address: ServerAddress, why: str, remote: bool = False) -> None:
    """Has a server ended and started again by whoever owns it; returns at once, `attached` waits for the new one.

    Args:
        why: told to the launcher, or in the server's log.
        remote: it is of `rollout.urls`. It is asked to end, its own `tulu-mega serve` starts it again; where it does not answer,
            that notices by itself.
    """
    if remote:
        _ASKED.add((address.url, address.incarnation))
        with contextlib.suppress(httpx.HTTPError):
            asked = {"incarnation": address.incarnation, "why": why}
            _client().post(address.url + RESTART, headers=_headers(address.key), json=asked)
        return
    folder = Path(run_dir, FOLDER)
    folder.mkdir(parents=True, exist_ok=True)
    file = _request(folder, address.url, address.incarnation)
    part = file.with_suffix(f".part{os.getpid()}")
    part.write_text(why, encoding="utf-8")
    part.replace(file)


def restart_asked(folder: Path, url: str, incarnation: int) -> str | None:
    """Why a rank wants this very incarnation of one of our own servers gone, if one does."""
    try:
        return _request(folder, url, incarnation).read_text(encoding="utf-8")
    except FileNotFoundError:
        return None


def _request(folder: Path, url: str, incarnation: int) -> Path:
    return folder / f"restart_{hashlib.sha256(url.encode()).hexdigest()[:12]}_{incarnation}"


def _remote(settings: RolloutSettings) -> list[ServerAddress]:
    key = key_from_environment()
    state: dict[str, ServerAddress | str] = {}

    def ready() -> bool:
        for url in settings.urls:
            state[url] = _ask(url, key)
        for each in state.values():
            if isinstance(each, ServerAddress) and (each.url, each.incarnation) in _ASKED:
                state[each.url] = "has not been started again yet"
        return all(isinstance(each, ServerAddress) for each in state.values())

    def missing() -> str:
        return "; ".join(f"{url} {each}" for url, each in state.items() if isinstance(each, str))

    _wait(ready, longest_wait(settings), REMOTE_POLL_SECONDS, missing)
    return [state[url] for url in settings.urls]


def _ask(url: str, key: str | None) -> ServerAddress | str:
    """The server's address, or why it cannot be used yet."""
    try:
        about, health = (_client().get(url + path, headers=_headers(key)) for path in (ABOUT, "/health"))
    except httpx.HTTPError as error:
        return f"does not answer ({str(error) or type(error).__name__})"
    if about.status_code == 401:
        raise UserError(f"{url} refuses the key; {KEY} must hold the one that its tulu-mega serve was started with")
    if about.status_code != 200 or health.status_code != 200:
        return f"answers with status {about.status_code if about.status_code != 200 else health.status_code}"
    try:
        return ServerAddress(url, key, int(about.json()["incarnation"]))
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{url} is not a server of tulu-mega serve; rollout.urls takes only such") from None


def _headers(key: str | None) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"} if key else {}


@functools.cache
def _client() -> httpx.Client:
    """One for all: making it takes longer than a request. A proxy has no business between a trainer and its servers."""
    return httpx.Client(timeout=REPLY_SECONDS, trust_env=False)


def _wait(ready: Callable[[], bool], seconds: float, period: float, so_far: Callable[[], str]) -> None:
    until = time.monotonic() + seconds
    while not ready():
        if time.monotonic() > until:
            raise UserError(f"the vLLM servers are not ready after {seconds:.0f} s ({so_far()}); see their logs, or raise "
                            "rollout.start_timeout")  # fmt: skip
        time.sleep(period)
