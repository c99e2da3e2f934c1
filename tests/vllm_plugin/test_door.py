"""The door of a server: what it answers itself, and to whom."""

from __future__ import annotations

import asyncio

import httpx
import pytest

from tulu_mega.vllm_plugin import auth
from tulu_mega.vllm_plugin.auth import ASKED, INCARNATION, KEY, RESTART, Door


class Ended(Exception):
    """In place of the process's end."""


@pytest.fixture
def ask(monkeypatch):
    """Sends a request to a door of incarnation 7 with key `k`; the application behind it would answer 204."""
    monkeypatch.setenv(KEY, "k")
    monkeypatch.setenv(INCARNATION, "7")

    def end(status: int) -> None:
        raise Ended(status)

    monkeypatch.setattr(auth.os, "_exit", end)

    async def behind(_scope, _receive, send) -> None:
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body"})

    def ask(verb: str, path: str, key: str | None = "k", **request) -> httpx.Response:
        async def send() -> httpx.Response:
            async with httpx.AsyncClient(transport=httpx.ASGITransport(Door(behind)), base_url="http://server") as client:
                headers = {} if key is None else {"Authorization": f"Bearer {key}"}
                return await client.request(verb, path, headers=headers, **request)

        return asyncio.run(send())

    return ask


@pytest.mark.parametrize("key", [None, "", "K", "k ", "kk"])
@pytest.mark.parametrize(("verb", "path"), [("GET", "/health"), ("POST", "/collective_rpc"), ("POST", RESTART)])
def test_nobody_comes_in_without_the_key(ask, verb, path, key):
    assert ask(verb, path, key, json={"incarnation": 7, "why": ""}).status_code == 401
    assert ask("GET", "/health").status_code == 204


def test_no_server_without_a_key(monkeypatch):
    monkeypatch.delenv(KEY, raising=False)
    with pytest.raises(RuntimeError, match=KEY):
        Door(None)


def test_a_server_ends_when_it_is_asked_to_be_started_again(ask, capsys):
    with pytest.raises(Ended, match=str(ASKED)):
        ask("POST", RESTART, json={"incarnation": 7, "why": "a tensor\nis missing"})
    assert capsys.readouterr().err == "A trainer asks for this server to be started again: 'a tensor\\nis missing'\n"


def test_whoever_asks_an_incarnation_that_is_gone_ends_no_other(ask):
    answer = ask("POST", RESTART, json={"incarnation": 6, "why": "old"})
    assert answer.status_code == 409 and "incarnation 6 is gone, this is 7" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    "asked",
    [
        {},
        {"content": b"{"},
        {"json": [7]},
        {"json": {"incarnation": 7}},
        {"json": {"why": "x"}},
        {"content": b'{"incarnation": Infinity, "why": "x"}'},
    ],
)
def test_a_request_that_says_nothing_ends_nothing(ask, asked):
    assert ask("POST", RESTART, **asked).status_code == 400


def test_looking_is_not_asking(ask):
    assert ask("GET", RESTART).status_code == 204  # what is behind the door knows no such route
