"""A server of the tests' own in the place of vLLM's, whose answers a test decides."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import Callable

import pytest
from aiohttp import web

from tulu_mega.config import RolloutSettings
from tulu_mega.inference.sampling import Sampling
from tulu_mega.vllm_plugin.auth import ABOUT
from tulu_mega.vllm_plugin.batch_route import ROUTE
from tulu_mega.weight_transfer.server import ServerAddress

VOCABULARY, LONGEST = 100, 32
SAMPLING = Sampling(max_tokens=4, temperature=1.0, samples=2, seed=7)


def choice(index: int, ids: list[int], version: str = "3") -> dict:
    """A well-formed response as vLLM sends it."""
    return {
        "index": index,
        "finish_reason": "length",
        "token_ids": ids,
        "logprobs": [-0.5 - at for at in range(len(ids))],
        "weight_versions": [{"version": version, "start": 0, "end": len(ids)}],
    }


def answer(request: dict) -> dict:
    """Tokens that follow from what was asked: the seed and the sample's number."""
    parameters = request["sampling_params"]
    first = parameters["seed"] % 50
    ids = range(parameters["n"])
    return {"choices": [choice(number, [first + number] * parameters["max_tokens"]) for number in reversed(ids)]}


class Fake:
    """A server whose answer to each prompt a test decides. `requests`: the prompts it was asked; `batches`: how many at once."""

    def __init__(self, reply: Callable[[dict], object] = answer, vocabulary: int = VOCABULARY):
        self.reply, self.vocabulary = reply, vocabulary
        self.requests: list[dict] = []
        self.batches: list[int] = []
        self.keys: set[str | None] = set()
        self.dropped = 0

    async def about(self, _request: web.Request) -> web.Response:
        return web.json_response({"incarnation": 1, "longest": LONGEST, "vocabulary": self.vocabulary})

    async def generate(self, request: web.Request) -> web.StreamResponse:
        try:
            return await self._generate(request)
        except (asyncio.CancelledError, ConnectionError):  # while it thinks, or while it writes
            self.dropped += 1
            raise

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        asked = (await request.json())["prompts"]
        self.keys.add(request.headers.get("Authorization"))
        self.batches.append(len(asked))
        self.requests += asked
        response, decide = web.StreamResponse(), self.reply  # a test may decide otherwise for later requests
        for place, one in reversed(list(enumerate(asked))):  # in an order that nobody may count on
            reply = decide(one)
            if asyncio.iscoroutine(reply):
                reply = await reply
            if isinstance(reply, web.Response):
                return reply
            if not response.prepared:
                await response.prepare(request)
            await response.write(reply if isinstance(reply, bytes) else json.dumps({"place": place, **reply}).encode() + b"\n")
        return response


@pytest.fixture
def serve():
    """Starts a Fake and gives its address."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    runners = []

    def run(coroutine):
        return asyncio.run_coroutine_threadsafe(coroutine, loop).result(120)

    def start(fake: Fake) -> ServerAddress:
        async def listen() -> int:
            app = web.Application()
            app.router.add_get(ABOUT, fake.about)
            app.router.add_post(ROUTE, fake.generate)
            runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
            await runner.setup()
            site = web.TCPSite(runner, "127.0.0.1", 0)
            await site.start()
            runners.append(runner)
            return site._server.sockets[0].getsockname()[1]

        return ServerAddress(f"http://127.0.0.1:{run(listen())}", "secret", 1)

    yield start
    for runner in runners:
        run(runner.cleanup())
    loop.call_soon_threadsafe(loop.stop)
    thread.join()


def settings(**values) -> RolloutSettings:
    return RolloutSettings(**{"request_timeout": 120.0, **values})


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
