"""What middleware of a vLLM server needs of ASGI: its types, a request's body, an answer in JSON."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from typing import Any

Scope = dict[str, Any]
Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


async def body(receive: Receive, limit: int = 1 << 20) -> bytes:
    """The body of a request, whole.

    Args:
        limit: bytes that it may have.

    Raises:
        ValueError: it has more, or the client left before its end.
    """
    parts, size, more = [], 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ValueError("the client left before the end of its request")
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > limit:
            raise ValueError(f"the request's body is larger than {limit} bytes, the limit of this route")
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
