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
import socket
import ssl
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import httpx

from tulu_mega.config.rollout import RolloutSettings
from tulu_mega.errors import UserError
from tulu_mega.outside.json_input import read_json_text
from tulu_mega.vllm_plugin.auth import KEY, RESTART
from tulu_mega.weight_transfer.counterpart import ABOUT
from tulu_mega.weight_transfer.server import ServerAddress

FOLDER = "servers"
POLL_SECONDS = 0.1
REMOTE_POLL_SECONDS = 1.0
REPLY_SECONDS = 10.0
SLACK_SECONDS = 10.0
"""How much longer ranks wait than the launcher, which knows better what went wrong."""
WORD_SECONDS = 10.0
"""Who is waited for is said as often."""
LOADING = (429, 500, 502, 503, 504)
"""Statuses of a server, or of what stands before it, that may come up yet."""
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


@dataclass(frozen=True)
class _Answer:
    """A server that can be used."""

    address: ServerAddress
    about: dict[str, Any]
    """what it says of itself"""


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
            and all(_well(each) for each in found)
        )

    def missing() -> str:
        there = {each.url for each in found}
        left = [
            number for number in range(settings.servers) if (said := read_record(folder, number)) is None or said.url not in there
        ]
        logs = ", ".join(str(Path(run_dir, "logs", f"server_{number}.log")) for number in left)
        return f"{len(found)} of {settings.servers} are ready" + (f"; see {logs}" if logs else "")

    _wait(ready, longest_wait(settings), POLL_SECONDS, missing)
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


def look(settings: RolloutSettings) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Asks the servers of `rollout.urls` once.

    Returns:
        url -> what it says of itself (`counterpart.told`); url -> why it cannot be used yet.

    Raises:
        UserError: with every one that never will: it refuses the key, is no server of ours, or two URLs lead to one.
    """
    answers = _asked(settings.urls, key_from_environment())
    about = {url: each.about for url, each in answers.items() if isinstance(each, _Answer)}
    return about, {url: each for url, each in answers.items() if isinstance(each, str)}


def _remote(settings: RolloutSettings) -> list[ServerAddress]:
    key = key_from_environment()
    state: dict[str, ServerAddress | str] = {}

    def ready() -> bool:
        for url, answer in _asked(settings.urls, key).items():
            state[url] = answer if isinstance(answer, str) else answer.address
        for each in state.values():
            if isinstance(each, ServerAddress) and (each.url, each.incarnation) in _ASKED:
                state[each.url] = "has not been started again yet"
        return all(isinstance(each, ServerAddress) for each in state.values())

    def missing() -> str:
        return "; ".join(f"{url} {each}" for url, each in state.items() if isinstance(each, str))

    _wait(ready, longest_wait(settings), REMOTE_POLL_SECONDS, missing)
    return [state[url] for url in settings.urls]


def _well(address: ServerAddress) -> bool:
    """Whether one of our own servers is there; another process may have its port by now."""
    try:
        answer = _ask(address.url, address.key)
    except UserError:
        return False
    return isinstance(answer, _Answer) and answer.address == address


def _asked(urls: Sequence[str], key: str | None) -> dict[str, _Answer | str]:
    """As `_ask`, of several servers at once: one that does not answer takes its time for itself.

    Raises:
        UserError: with every one that will never do, and with URLs that lead to one server.
    """
    problems, answers = [], {}
    with ThreadPoolExecutor(max(1, len(urls))) as pool:
        for url, future in [(url, pool.submit(_ask, url, key)) for url in urls]:
            try:
                answers[url] = future.result()
            except UserError as error:
                problems += error.problems
    same: dict[str, list[str]] = {}
    for url, each in answers.items():
        if isinstance(each, _Answer) and "process" in each.about:
            same.setdefault(each.about["process"], []).append(url)
    problems += [f"rollout.urls: {' and '.join(each)} lead to one server; name it once" for each in same.values() if each[1:]]
    if problems:
        raise UserError(problems)
    return answers


def _ask(url: str, key: str | None) -> _Answer | str:
    """What a server answers, or why it cannot be used yet.

    Raises:
        UserError: it never will: waiting changes nothing.
    """
    try:
        about, health = (_client().get(url + path, headers=_headers(key)) for path in (ABOUT, "/health"))
    except httpx.HTTPError as error:
        if why := _hopeless(error):
            raise UserError(f"{url}: {why}") from None
        return f"does not answer ({str(error) or type(error).__name__})"
    if about.status_code == 401:
        raise UserError(f"{url} refuses the key; {KEY} must hold the one that its tulu-mega serve was started with")
    status = about.status_code if about.status_code != 200 else health.status_code
    if status in LOADING:
        return f"answers with status {status}"
    try:
        if status != 200:
            raise ValueError
        said = about.json()
        return _Answer(ServerAddress(url, key, int(said["incarnation"])), said)
    except (ValueError, KeyError, TypeError):
        raise UserError(
            f"{url} answers with status {status}, as no server of tulu-mega serve does; rollout.urls takes only such"
        ) from None


def _hopeless(error: httpx.HTTPError) -> str:
    """What is wrong for good where a server cannot be asked; empty where it may only be on its way."""
    chain: list[BaseException] = [error]
    while before := chain[-1].__cause__ or chain[-1].__context__:
        chain.append(before)
    for each in chain:
        if isinstance(each, ssl.SSLError):
            return (
                f"no TLS connection ({each.reason or each}); tulu-mega serve speaks plain HTTP: write http://, or see to the "
                "certificate of what stands before it"
            )
        if isinstance(each, socket.gaierror) and each.errno != socket.EAI_AGAIN:
            return f"there is no such host ({each.strerror}); write the address that tulu-mega serve prints"
    if isinstance(error, httpx.RemoteProtocolError) and "illegal" in str(error):
        return f"what listens there does not speak HTTP ({error}); write the address that tulu-mega serve prints"
    return ""


def _headers(key: str | None) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"} if key else {}


@functools.cache
def _client() -> httpx.Client:
    """One for all: making it takes longer than a request. A proxy has no business between a trainer and its servers."""
    return httpx.Client(timeout=REPLY_SECONDS, trust_env=False)


def _wait(ready: Callable[[], bool], seconds: float, period: float, so_far: Callable[[], str]) -> None:
    """Returns when the servers are ready; who is waited for is said every now and then."""
    began = said = time.monotonic()
    while not ready():
        now = time.monotonic()
        if now - said >= WORD_SECONDS:
            said = now
            print(f"waiting for vLLM servers, {now - began:.0f} of {seconds:.0f} s: {so_far()}", file=sys.stderr, flush=True)
        if now > began + seconds:
            raise UserError(f"the vLLM servers are not ready after {seconds:.0f} s ({so_far()}); see their logs, or raise "
                            "rollout.start_timeout")  # fmt: skip
        time.sleep(period)
