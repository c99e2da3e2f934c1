"""What middleware in a vLLM server's process says and hears: ASGI's types, a request's body, an answer in JSON."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from typing import Any

Scope = dict[str, Any]
Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


async def body(receive: Receive) -> bytes:
    """A request's, whole."""
    parts, more = [], True
    while more:
        message = await receive()
        parts.append(message.get("body", b""))
        more = message.get("more_body", False)
    return b"".join(parts)


async def answer(send: Send, status: int, content: dict[str, Any]) -> None:
    """An object as the whole answer."""
    told = json.dumps(content).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(told)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": told})


async def refuse(send: Send, status: int, message: str, kind: str) -> None:
    """An error in the form of vLLM's own.

    Args:
        kind: its type, one word.
    """
    await answer(send, status, {"error": {"message": message, "type": kind, "code": status}})
