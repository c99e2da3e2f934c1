"""What goes past the door of a server: the routes that a trainer needs, with bodies within bounds; nothing else, and no error."""

from __future__ import annotations

import asyncio
import json
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tulu_mega.inference.sampling import Sampling
from tulu_mega.vllm_plugin.batch_route import MAX_BODY, ROUTE
from tulu_mega.vllm_plugin.bounds import GENERATE, MAX_OTHER, ROUTES, SAMPLING, Bounds
from tulu_mega.vllm_plugin.gate import ADAPTER

LONGEST, VOCABULARY = 32, 100
MODEL = SimpleNamespace(max_model_len=LONGEST, get_vocab_size=lambda: VOCABULARY)
APP = SimpleNamespace(state=SimpleNamespace(vllm_config=SimpleNamespace(model_config=MODEL)))
PROMPT = {"token_ids": [0, 99], "sampling_params": Sampling(max_tokens=9, seed=3, allowed_ids=(5,)).parameters(7)}


def ask(method: str, path: str, content: bytes, parts: int = 1) -> tuple[int, bytes]:
    """Status and text of the answer; what reaches the server is answered by it with status 200 and the body that it got."""
    said: list[dict[str, Any]] = []
    size = max(1, len(content) // parts)
    pieces = [content[at : at + size] for at in range(0, len(content), size)] or [b""]
    messages = [
        {"type": "http.request", "body": piece, "more_body": number < len(pieces) - 1} for number, piece in enumerate(pieces)
    ]

    async def receive() -> dict[str, Any]:
        return messages.pop(0) if messages else {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        said.append(message)

    async def server(_scope, receive, send) -> None:
        got = await receive()
        assert not got["more_body"] and (await receive())["type"] == "http.disconnect"
        await send({"type": "http.response.start", "status": 200})
        await send({"type": "http.response.body", "body": got["body"]})

    asyncio.run(Bounds(server)({"type": "http", "method": method, "path": path, "app": APP}, receive, send))
    return said[0]["status"], said[1]["body"]


def post(path: str, asked: object) -> tuple[int, str]:
    status, text = ask("POST", path, asked if isinstance(asked, bytes) else json.dumps(asked).encode(), parts=3)
    return status, text.decode()


def batch(**changes: object) -> dict:
    return {"prompts": [PROMPT, PROMPT | changes]}


def sampling(**changes: object) -> dict:
    return batch(sampling_params=PROMPT["sampling_params"] | changes)


@pytest.mark.parametrize(
    ("path", "asked"),
    [
        (ROUTE, batch()),
        (ROUTE, {"prompts": []}),
        (ROUTE, sampling(temperature=0, top_p=None, stop_token_ids=[1, 2])),
        (GENERATE, {"token_ids": [1], "sampling_params": {"max_tokens": 2, "temperature": 0.0}}),
        ("/update_weights", {"update_info": {"begin": {}}}),
        ("/finish_weight_update", {"weight_version": None}),  # of a rehearsal, which `tools/bench_sync.py` times
        ("/finish_weight_update", {"weight_version": "7"}),
        ("/pause", b""),
    ],
)
def test_what_a_trainer_asks_reaches_the_server_as_it_is(path, asked):
    content = asked if isinstance(asked, bytes) else json.dumps(asked).encode()
    assert ask("POST", path, content, parts=4) == (200, content)


def test_weights_are_looked_at_and_not_reset():
    """vLLM's checker has an action that makes them random, of which the gate is not told."""
    assert post("/weight_checker", {"action": "checksum"})[0] == 200
    for asked in (
        {"action": "reset"},
        {"action": "compare", "baseline": {}},
        {"action": "checksum", "baseline": {}},
        {},
        ["reset"],
    ):
        assert post("/weight_checker", asked)[0] == 400


@pytest.mark.parametrize("timeout", [{}, {"timeout": 0}, {"timeout": 60}, {"timeout": None}])
def test_a_call_of_the_workers_has_no_time_out_within_the_engine(timeout):
    """vLLM takes the reply that comes too late for that of the next call, and its engine ends."""
    status, told = post("/collective_rpc", {"method": "weights_status", **timeout})
    assert (status, json.loads(told)) == (200, {"method": "weights_status"})


BROKEN = {
    "beyond the vocabulary": batch(token_ids=[100]),
    "negative": batch(token_ids=[-1]),
    "a truth": batch(token_ids=[True]),
    "a float": batch(token_ids=[1.0]),
    "text": batch(token_ids="12"),
    "no tokens": batch(token_ids=[]),
    "longer than the model": batch(token_ids=[1] * LONGEST),
    "another field": batch(lora="x"),
    "an adapter that is not here": batch(adapter="policy"),
    "an adapter without a name": batch(adapter=7),
    "no prompts": {},
    "a list": [],
    "null": None,
    "deep": b"[" * 100_000,
    "no JSON": b"\xff\xfe",
    "empty": b"",
    "n too many": sampling(n=1 << 20),
    "n a truth": sampling(n=True),
    "temperature NaN": sampling(temperature=float("nan")),
    "temperature infinite": sampling(temperature=float("inf")),
    "temperature huge": sampling(temperature=10**400),
    "temperature below": sampling(temperature=-1),
    "top_p 0": sampling(top_p=0),
    "longer responses than the model": sampling(max_tokens=LONGEST + 1),
    "seed out of 64 bits": sampling(seed=1 << 70),
    "allowed beyond the vocabulary": sampling(allowed_token_ids=[100]),
    "allowed none": sampling(allowed_token_ids=[]),
    "a stop string": sampling(stop=["x"]),
    "a grammar": sampling(structured_outputs={"regex": "(a+)+b"}),
    "a processor": sampling(logits_processors=["os:system"]),
}  # fmt: skip


@pytest.mark.parametrize("asked", BROKEN.values(), ids=BROKEN)
def test_a_batch_out_of_bounds_is_refused(asked):
    status, told = post(ROUTE, asked)
    assert status == 400 and ROUTE in json.loads(told)["error"]["message"] and len(told) < 700


@pytest.mark.parametrize(
    "asked",
    [
        {"method": "no_such_method"},
        {"method": "weights_status", "args": [1]},
        {"method": "shutdown"},
        *({"method": "weights_status", "timeout": timeout} for timeout in ("x", "", [], False, 10**400)),
        {"method": "weights_status", "timeout": -1},
        ["weights_status"],
        {"method": ["weights_status"]},
    ],
)
def test_only_methods_that_tell_are_called(asked):
    assert post("/collective_rpc", asked)[0] == 400


@pytest.mark.parametrize(
    ("method", "path"),
    [
        *(("POST", "/v1/completions"), ("POST", "/sleep"), ("POST", "/start_profile"), ("POST", "/load_lora_adapter")),
        *(("GET", "/docs"), ("GET", "/pause"), ("PUT", "/resume"), ("GET", "/../health"), ("GET", "/" + "x" * 100_000)),
    ],
)
def test_no_other_route_is_served(method, path):
    status, told = ask(method, path, b"{}")
    assert status == 404 and len(told) < 500


@pytest.mark.parametrize(("path", "limit"), [(ROUTE, MAX_BODY), (GENERATE, MAX_OTHER)])
def test_a_body_without_end_is_refused(path, limit):
    piece = bytes(1 << 24)
    reads = 0

    async def receive() -> dict[str, Any]:
        nonlocal reads
        reads += 1
        return {"type": "http.request", "body": piece, "more_body": True}

    said = []

    async def send(message: dict[str, Any]) -> None:
        said.append(message)

    asyncio.run(Bounds(None)({"type": "http", "method": "POST", "path": path, "app": APP}, receive, send))
    assert said[0]["status"] == 413 and reads == limit // len(piece) + 1


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from([*SAMPLING, "token_ids", "x"]), inner, max_size=4)
    ),
    max_leaves=8,
)


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from(sorted(path for method, path in ROUTES if method == "POST")),
    st.binary(max_size=60)
    | JSON.map(lambda value: json.dumps(value).encode())
    | JSON.map(lambda value: json.dumps({"prompts": [{"token_ids": [1], "sampling_params": value}]}).encode())
    | JSON.map(lambda value: json.dumps({"token_ids": value, "sampling_params": {}}).encode()),
)
def test_any_request_is_answered(path, content):
    assert ask("POST", path, content)[0] in (200, 400)


def test_an_adapter_can_be_named_once_it_is_here(monkeypatch):
    status, told = post(ROUTE, batch(adapter="policy"))
    assert status == 400 and "prompt 1: this server has no adapter 'policy'; it has none" in told
    monkeypatch.setattr(APP.state, ADAPTER, 7, raising=False)
    monkeypatch.setattr(APP.state, "openai_serving_models", SimpleNamespace(lora_requests={"adapter": None}), raising=False)
    assert post(ROUTE, batch(adapter="policy"))[0] == post(ROUTE, batch(adapter="adapter"))[0] == 200
    assert "it has adapter, policy" in post(ROUTE, batch(adapter="other"))[1]
