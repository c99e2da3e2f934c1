"""The gate before a server's routes, with an engine that is none."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest

from tulu_mega.vllm_plugin import gate

WORKER = {"worker": 0, "open": False, "committed": True, "whole": True, "problems": [], "broken": None, "adapter": None}


class Engine:
    """Answers with the workers' state, after some seconds."""

    def __init__(self, seconds: float = 0.0, **state: object):
        self._seconds, self._state, self.calls = seconds, WORKER | state, []

    async def is_paused(self) -> bool:
        return True

    async def collective_rpc(self, *arguments: object, **named: object) -> list[dict]:
        self.calls.append((arguments, named))
        await asyncio.sleep(self._seconds)
        return [self._state]


def ask(engine: Engine, *paths: str, state: SimpleNamespace | None = None) -> int:
    """Status of the last request's answer; 200 of the server itself."""
    said = []

    async def send(message: dict) -> None:
        said.append(message)

    async def server(_scope, _receive, send) -> None:
        await send({"status": 200})

    before, app = gate.WeightsGate(server), SimpleNamespace(state=state or SimpleNamespace(engine_client=engine))
    for path in paths:
        said.clear()
        asyncio.run(before({"type": "http", "method": "POST", "path": path, "app": app}, None, send))
    return said[0]["status"]


@pytest.mark.parametrize("path", ["/start_weight_update", "/finish_weight_update", "/resume"])
def test_workers_are_asked_without_a_time_out_within_the_engine(path):
    """vLLM takes the reply that comes too late for that of the next call, and its engine ends."""
    engine = Engine()
    method = "place_adapter" if path == "/resume" else "weights_status"
    assert ask(engine, path) == 200 and engine.calls == [((method,), {})]


@pytest.mark.parametrize("path", ["/start_weight_update", "/finish_weight_update", "/resume"])
def test_whoever_waits_for_workers_that_do_not_answer_is_told(path, monkeypatch):
    monkeypatch.setattr(gate, "ASK_SECONDS", 0.05)
    assert ask(Engine(seconds=30), path) == 503


def test_what_is_not_whole_is_refused():
    assert ask(Engine(committed=False), "/finish_weight_update") == 409
    assert ask(Engine(whole=False, broken="torn"), "/resume") == 409


def test_requests_can_name_an_adapter_from_the_resume_on_for_which_every_worker_has_it_in_its_place():
    state = SimpleNamespace(engine_client=Engine(whole=False, broken="not in its place", adapter=7))
    assert ask(state.engine_client, "/resume", state=state) == 409 and getattr(state, gate.ADAPTER) is None
    state.engine_client = Engine(adapter=7)
    assert ask(state.engine_client, "/resume", state=state) == 200 and getattr(state, gate.ADAPTER) == 7


def test_random_weights_answer_nothing_before_an_update():
    bare, whole = Engine(whole=False, broken="random weights"), Engine()
    assert ask(bare, "/inference/tulu_mega/batch") == ask(bare, "/pause", "/v1/completions") == 503
    assert ask(whole, "/inference/tulu_mega/batch", "/v1/completions", "/v1/completions") == 200
    assert len(whole.calls) == 1, "the workers are asked once"
    bare = Engine(whole=False, broken="random weights")
    assert ask(bare, "/v1/completions", "/start_weight_update", "/v1/completions") == 503
    bare._state = WORKER
    assert ask(bare, "/v1/completions", "/start_weight_update", "/resume", "/v1/completions") == 200
