"""What a vLLM server for training refuses, and the arguments that make a server one.

Only the workers know whether their weights are whole. The gate asks them before every route that would use the weights. It is
ASGI middleware in the server's process, so it holds for every client.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

from tulu_mega.vllm_plugin.asgi import App, Receive, Scope, Send, refuse

BACKEND = "tulu_mega"
"""Our weight transfer engine's name in vLLM's registries."""
ASK_SECONDS = 60.0
ADAPTER = "tulu_mega_adapter"
"""Name in the server's state of the version of the trainer's adapter that requests may name; None or nothing: there is none."""
KIND = "WeightsError"
"""Type of the errors that it answers."""
_BETWEEN = "the weights of this server are being updated, or an update of them broke; ask another"
_BARE = "this server was started with random weights, and no trainer has sent it others yet; ask another"
SERVING = ("/v1/", "/inference/", "/generate")
"""Beginnings of the routes that use the model."""


def server_arguments() -> list[str]:
    """Return the arguments by which a vLLM server takes weights from a trainer and refuses to serve broken ones.

    The server's environment needs ``VLLM_SERVER_DEV_MODE=1``.
    """
    return [
        *("--weight-transfer-config", json.dumps({"backend": BACKEND})),
        *("--worker-extension-cls", "tulu_mega.vllm_plugin.worker.WeightsReport"),
        *("--middleware", "tulu_mega.vllm_plugin.gate.WeightsGate"),
    ]


class WeightsGate:
    """Middleware: an update begins only on a paused server and finishes only if it came whole; nothing is served meanwhile, nor
    by random weights before the first update."""

    def __init__(self, app: App):
        self._app = app
        self._updating = False
        self._started_whole: bool | None = None
        """whether the server read weights when it started; None until the workers are asked"""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            path = scope["path"]
            refusal = None
            try:
                if scope["method"] == "POST":
                    state = scope["app"].state
                    refusal = await self._refusal(path, state)
                    if self._started_whole is None and path.startswith(SERVING):
                        workers = await _asked(state.engine_client, "weights_status")
                        self._started_whole = all(worker["whole"] for worker in workers)
                        self._updating |= not self._started_whole
            except TimeoutError:
                await refuse(send, 503, f"the workers of this server have not answered for {ASK_SECONDS:g} s; ask another", KIND)
                return
            if self._updating and path.startswith(SERVING):
                await refuse(send, 503, _BARE if self._started_whole is False else _BETWEEN, KIND)
                return
            if refusal is not None:
                await refuse(send, 409, refusal, KIND)
                return
        await self._app(scope, receive, send)

    async def _refusal(self, path: str, state: Any) -> str | None:
        """Why a request is not handed on."""
        engine = state.engine_client
        if path == "/start_weight_update":
            return await self._may_start(engine)
        if path == "/finish_weight_update":
            return _unless_all(await _asked(engine, "weights_status"), "committed")
        if path == "/resume":
            # what vLLM threw out when the update ended is put back by all workers, or none of them serves
            workers = await _asked(engine, "place_adapter")
            refusal = _unless_all(workers, "whole")
            if refusal is None:
                self._updating, self._started_whole = False, True
            setattr(state, ADAPTER, workers[0]["adapter"] if refusal is None else None)
            return refusal
        return None

    async def _may_start(self, engine: Any) -> str | None:
        if not await engine.is_paused():
            return "the server is not paused: POST /pause first"
        self._updating = True
        if any(worker["open"] for worker in await _asked(engine, "weights_status")):
            await engine.finish_weight_update()  # of a trainer that went away; vLLM opens no second one beside it
        return None


async def _asked(engine: Any, method: str) -> list[dict[str, Any]]:
    """What all workers answer.

    Raises:
        TimeoutError: the workers do not answer.
    """
    # the engine itself goes on waiting for their replies: it would take those that come too late for other calls'
    return await asyncio.wait_for(engine.collective_rpc(method), ASK_SECONDS)


def _unless_all(workers: list[dict[str, Any]], state: str) -> str | None:
    """What is wrong, unless all workers are in a state."""
    wrong = [worker for worker in workers if not worker[state]]
    if not wrong:
        return None
    problems = [problem for worker in wrong for problem in worker["problems"]]
    return "\n".join(problems) or f"worker {wrong[0]['worker']}: {wrong[0]['broken'] or 'no update has been committed'}"
