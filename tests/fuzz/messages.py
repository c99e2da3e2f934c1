"""Parsers of what comes over sockets: bodies of a server's requests, a server's answers, messages about weights."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx

from tests.lib.fuzzing import Parser
from tulu_mega.inference.reply import parsed, responses
from tulu_mega.inference.sampling import Sampling
from tulu_mega.vllm_plugin.auth import INCARNATION, RESTART, _end
from tulu_mega.vllm_plugin.batch_route import ROUTE
from tulu_mega.vllm_plugin.bounds import GENERATE, ROUTES, Bounds
from tulu_mega.weight_transfer.control import ServerControl
from tulu_mega.weight_transfer.ledger import Ledger
from tulu_mega.weight_transfer.protocol import (
    Bucket,
    Expected,
    Place,
    begin_message,
    bucket_message,
    commit_message,
    read_begin,
    read_bucket,
    read_commit,
)
from tulu_mega.weight_transfer.server import ServerFailure

LONGEST, VOCABULARY = 32, 100
SAMPLING = Sampling(max_tokens=9, seed=3, samples=2)
PROMPT = {"token_ids": [0, 99], "sampling_params": SAMPLING.parameters(7)}
BODIES: dict[str, Any] = {
    ROUTE: {"prompts": [PROMPT, PROMPT]},
    GENERATE: {**PROMPT, "model": "m", "stream": False},
    "/collective_rpc": {"method": "weights_status", "timeout": 3.0},
    "/update_weights": {"update_info": {"bucket": {}}},
    "/abort_requests": {},
}
ANSWER = {
    "place": 0,
    "choices": [
        {"index": index, "token_ids": [3, 4], "logprobs": [-0.5, -1], "finish_reason": "stop",
         "weight_versions": [{"version": "7", "start": 0, "end": 2}]}
        for index in (0, 1)
    ],
}  # fmt: skip
EXPECTED = {"a": Expected((2, 3), "float32", 0), "b": Expected((4,), "bfloat16", 1)}


def parsers(place: Path) -> dict[str, Parser]:
    return {**bodies(), **answers(), **weights()}


def answered(app: Callable, method: str, path: str, content: bytes) -> int:
    """Status of what middleware answers to a request."""
    statuses: list[int] = []
    messages = [{"type": "http.request", "body": content, "more_body": False}]

    async def receive() -> dict[str, Any]:
        return messages.pop() if messages else {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        statuses.append(message.get("status", 0))

    model = SimpleNamespace(max_model_len=LONGEST, get_vocab_size=lambda: VOCABULARY)
    state = SimpleNamespace(vllm_config=SimpleNamespace(model_config=model))
    scope = {"type": "http", "method": method, "path": path, "app": SimpleNamespace(state=state), "headers": []}
    waiting = app(scope, receive, send)
    try:  # nothing waits here, so no loop is needed
        waiting.send(None)
    except StopIteration:
        return statuses[0]
    raise AssertionError("the middleware waits")


async def _served(_scope, _receive, send) -> None:
    await send({"type": "http.response.start", "status": 200})


def bodies() -> dict[str, Parser]:
    bounded = Bounds(_served)

    def of(path: str) -> Parser:
        def asked(data: bytes) -> None:
            assert answered(bounded, "POST", path, data) in (200, 400)

        return Parser(asked, [json.dumps(BODIES[path]).encode()], (), (b'"token_ids"', b'"n"', b'"seed"', b"1.0", b"-1"))

    def any_route(data: bytes) -> None:
        path = sorted(ROUTES)[data[0] % len(ROUTES) if data else 0]
        assert answered(bounded, *path, data[1:]) in (200, 400)

    def restarted(data: bytes) -> None:
        os.environ[INCARNATION] = "987654321"  # or this process would end
        assert answered(lambda scope, receive, send: _end(receive, send), "POST", RESTART, data) in (400, 409)

    return {
        **{f"server: body of {path}": of(path) for path in BODIES},
        "server: bodies of any route": Parser(any_route, [b"\0" + json.dumps(each).encode() for each in BODIES.values()], ()),
        "server: body of a restart": Parser(restarted, [b'{"incarnation": 6, "why": "x"}'], ()),
    }


def answers() -> dict[str, Parser]:
    def line(data: bytes) -> object:
        return responses(parsed(data), [1, 2], SAMPLING, 7, VOCABULARY)

    given = b""
    control = ServerControl("http://server", "key", 5.0)
    control._client = httpx.Client(
        transport=httpx.MockTransport(lambda request: httpx.Response(500 if given[:1] == b"\1" else 200, content=given[1:])),
        base_url="http://server",
    )

    def told(data: bytes) -> None:
        nonlocal given
        given = data
        for ask in (
            control.world_size, control.weight_info, control.reset_prefix_cache, control.weights_status, control.check_workers,
            control.arrived_checksums, lambda: control.check_workers("unattached"), control.pause,
        ):  # fmt: skip
            with contextlib.suppress(ServerFailure):
                ask()

    status = {"worker": 0, "fp8": False, "version": 3, "whole": True, "unattached": [], "problems": ["x"], "tensors": 2}
    seeds = [{"results": [status]}, {"world_size": 2}, {"weight_version": "3"}, {"success": True}, {"results": [{"a": "ab"}]}]
    return {
        "a server's line of responses": Parser(line, [json.dumps(ANSWER).encode()]),
        "a server's answers to its control": Parser(told, [b"\0" + json.dumps(each).encode() for each in seeds]
                                                    + [b'\1{"error": {"message": "x"}}'], ()),
    }  # fmt: skip


def weights() -> dict[str, Parser]:
    """As a worker takes them: ValueError, or a problem in its ledger."""

    def update(data: bytes) -> None:
        message = json.loads(data)
        if not isinstance(message, dict):
            raise ValueError("no message")
        ledger = Ledger(0, 3, EXPECTED)
        if "begin" in message:
            begin = read_begin(message["begin"])
            ledger = Ledger(0, begin.version, begin.manifest)
            ledger.compare(begin.version, {})
        if "bucket" in message:
            version, bucket = read_bucket(message["bucket"])
            if ledger.check(version, bucket, 1 << 20):
                assert all(0 <= place.offset <= place.offset + place.nbytes <= 1 << 20 for place in bucket.places)
        if "commit" in message:
            ledger.compare(*read_commit(message["commit"]))

    bucket = Bucket(0, 1, (Place("a", 0, 24),))
    seeds = [
        begin_message(3, EXPECTED, True), begin_message(3, EXPECTED, True, {"r": 3, "lora_alpha": 6}, "word"),
        bucket_message(3, bucket), commit_message(3, {"a": "ab", "b": "cd"}),
        bucket_message(3, Bucket(1, 0, (Place("b", 64, 8),))),
    ]  # fmt: skip
    return {"messages about weights": Parser(update, [json.dumps(each).encode() for each in seeds], (ValueError, RecursionError))}
