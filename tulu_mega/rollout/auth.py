"""The door of a vLLM server: ASGI middleware before all of its routes.

vLLM's own ``--api-key`` covers ``/v1`` and a few others, but not the routes that change weights, run methods in the workers
(``/collective_rpc``) or end the engine. Here every route asks for the key, ``/health`` too: whoever has reason to ask has the
key, and a route without one would tell every process of the machine that something is here, and wake the engine for it.
"""

from __future__ import annotations

import hmac
import json
import os
from collections.abc import Awaitable, Callable
from typing import Any

KEY = "TULU_MEGA_ROLLOUT_KEY"
"""Environment variable with the key: never an argument, which every process can read."""
INCARNATION = "TULU_MEGA_SERVER_INCARNATION"
ABOUT = "/tulu_mega/about"
"""Route that the door answers itself: ``{"incarnation", "longest", "vocabulary"}``."""

Scope = dict[str, Any]
Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


class Door:
    """Middleware: nobody comes in without the key of the environment.

    Raises:
        RuntimeError: there is none; the server must not start.
    """

    def __init__(self, app: App):
        key = os.environ.get(KEY)
        if not key:
            raise RuntimeError(f"{KEY} is not set")
        self._app = app
        self._expected = f"Bearer {key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif not self._knows_key(scope):
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1008})
            else:
                await _answer(send, 401, {"error": {"message": "wrong or missing key", "type": "Unauthorized", "code": 401}})
        elif scope["type"] == "http" and scope["path"] == ABOUT:
            await _answer(send, 200, _about(scope))
        else:
            await self._app(scope, receive, send)

    def _knows_key(self, scope: Scope) -> bool:
        given = [value for name, value in scope["headers"] if name.lower() == b"authorization"]
        return len(given) == 1 and hmac.compare_digest(given[0], self._expected)


def _about(scope: Scope) -> dict[str, Any]:
    model = scope["app"].state.vllm_config.model_config
    return {
        "incarnation": int(os.environ.get(INCARNATION, "0")),
        "longest": model.max_model_len,
        "vocabulary": model.get_vocab_size(),
    }


async def _answer(send: Send, status: int, content: dict[str, Any]) -> None:
    body = json.dumps(content).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
