"""The servers' addresses, which the launcher writes to RUN_DIR/servers and the ranks read.

``server_N.json`` is the launcher's record of its server N. ``restart_*`` is a rank's request to restart a server; it holds until
the server has another address than the request names. Requests to servers of other launchers (`rollout.urls`) are kept in the
memory of the process that made them.
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
"""Seconds that ranks wait longer than the launcher, whose error says what went wrong."""
WORD_SECONDS = 10.0
"""Seconds between lines that name the servers that are waited for."""
LOADING = (429, 500, 502, 503, 504)
"""HTTP statuses of a server, or of a proxy before it, that may still be starting."""
_ASKED: set[tuple[str, int]] = set()
"""URL and incarnation of servers that are not this run's own and that this process has asked to end."""


@dataclass(frozen=True)
class ServerRecord:
    """The launcher's record of one of its servers."""

    state: Literal["starting", "ready", "failed"]
    url: str = ""
    pid: int = 0
    incarnation: int = 0
    why: str = ""
    """why it failed, with the tail of its log; empty where it did not fail"""


@dataclass(frozen=True)
class _Answer:
    """A server that can be used."""

    address: ServerAddress
    about: dict[str, Any]
    """the server's description of itself"""


def write_record(folder: Path, number: int, record: ServerRecord) -> None:
    """Write a record atomically for the ranks."""
    file = folder / f"server_{number}.json"
    part = file.with_suffix(".part")
    folder.mkdir(parents=True, exist_ok=True)  # somebody may have removed it meanwhile
    part.write_text(json.dumps(asdict(record)), encoding="utf-8")
    part.replace(file)


def read_record(folder: Path, number: int) -> ServerRecord | None:
    """Read a record; None when the launcher has not written it yet."""
    try:
        told = read_json_text((file := folder / f"server_{number}.json").read_text(encoding="utf-8"))
        return ServerRecord(**told)
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        raise UserError(f"{file}: is not a server's record ({error}); start the run again") from None


def key_from_environment() -> str | None:
    return os.environ.get(KEY) or None


def attached(settings: RolloutSettings, run_dir: Path) -> list[ServerAddress]:
    """Wait until all servers answer and return them: those that the launcher started, or those of `rollout.urls`.

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
    """Return the seconds that `attached` waits: two starts for our own servers, since a restart may be under way when it
    begins."""
    return settings.start_timeout if settings.urls else 2 * settings.start_timeout + SLACK_SECONDS


def ask_restart(run_dir: Path, address: ServerAddress, why: str, remote: bool = False) -> None:
    """Ask the owner of a server to restart it. Returns at once; `attached` waits for the new server.

    Args:
        why: the reason, for the launcher or the server's log.
        remote: whether it is one of `rollout.urls`. Then the server is asked to end, and its own `tulu-mega serve` starts it
            again; `serve` notices by itself if the server does not answer.
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
    """Return why a rank asked to restart this incarnation of one of our own servers; None where none asked."""
    try:
        return _request(folder, url, incarnation).read_text(encoding="utf-8")
    except FileNotFoundError:
        return None


def _request(folder: Path, url: str, incarnation: int) -> Path:
    return folder / f"restart_{hashlib.sha256(url.encode()).hexdigest()[:12]}_{incarnation}"


def look(settings: RolloutSettings) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Ask each server of `rollout.urls` for its description once.

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
    """Return whether one of our own servers still answers; another process may have its port by now."""
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
    """Return a server's answer, or the reason why it cannot be used yet.

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
    """Describe an error that waiting does not mend; an empty text where the server may only be starting."""
    chain: list[BaseException] = [error]
    while before := chain[-1].__cause__ or chain[-1].__context__:
        chain.append(before)
    for each in chain:
        if isinstance(each, ssl.SSLError):
            return (
                f"no TLS connection ({each.reason or each}); tulu-mega serve speaks plain HTTP: write http://, or check the "
                "certificate of the proxy before it"
            )
        if isinstance(each, socket.gaierror) and each.errno != socket.EAI_AGAIN:
            return f"there is no such host ({each.strerror}); write the address that tulu-mega serve prints"
    if isinstance(error, httpx.RemoteProtocolError) and "illegal" in str(error):
        return f"the program that listens there does not speak HTTP ({error}); write the address that tulu-mega serve prints"
    return ""


def _headers(key: str | None) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"} if key else {}


@functools.cache
def _client() -> httpx.Client:
    """Return the HTTP client that all requests share: making one takes longer than a request. It ignores proxies."""
    return httpx.Client(timeout=REPLY_SECONDS, trust_env=False)


def _wait(ready: Callable[[], bool], seconds: float, period: float, so_far: Callable[[], str]) -> None:
    """Wait until the servers are ready; print now and then which are missing."""
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
