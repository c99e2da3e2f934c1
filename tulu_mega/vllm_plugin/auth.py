"""The door of a vLLM server: ASGI middleware before all of its routes.

vLLM's own ``--api-key`` covers ``/v1`` and a few others, but not the routes that change weights, run methods in the workers
(``/collective_rpc``) or end the engine. Here every route asks for the key, ``/health`` too. Every legitimate client has the
key; a route without one would tell each process of the machine that a server is here, and wake its engine.
"""

from __future__ import annotations

import hmac
import os
import secrets
import sys
from typing import Any

from tulu_mega.outside.json_input import read_json_text
from tulu_mega.vllm_plugin.asgi import App, Receive, Scope, Send, answer, body, refuse
from tulu_mega.weight_transfer.counterpart import ABOUT, Model, shape, told

KEY = "TULU_MEGA_ROLLOUT_KEY"
"""Environment variable with the key: never an argument, which every process can read."""
INCARNATION = "TULU_MEGA_SERVER_INCARNATION"
RESTART = "/tulu_mega/restart"
"""POST ``{"incarnation", "why"}``, answered by the door too, whatever the engine does: the server ends with status `ASKED`, so
that its owner starts it again; 409 when it is another incarnation by now."""
ASKED = 75
"""``EX_TEMPFAIL`` of sysexits.h."""
_PROCESS = secrets.token_hex(8)


class Door:
    """Middleware that refuses every request without the key of the environment.

    Raises:
        RuntimeError: the environment has no key; the server must not start.
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
                await refuse(send, 401, "wrong or missing key", "Unauthorized")
        elif scope["type"] == "http" and scope["path"] == ABOUT:
            await answer(send, 200, _about(scope))
        elif scope["type"] == "http" and scope["path"] == RESTART and scope["method"] == "POST":
            await _end(receive, send)
        else:
            await self._app(scope, receive, send)

    def _knows_key(self, scope: Scope) -> bool:
        given = [value for name, value in scope["headers"] if name.lower() == b"authorization"]
        return len(given) == 1 and hmac.compare_digest(given[0], self._expected)


def _about(scope: Scope) -> dict[str, Any]:
    """Answers `ABOUT`: incarnation, longest sequence, vocabulary, the largest rank of adapters that it holds apart from its
    weights (0: it holds none), a word that no other process has, model and versions."""
    config = scope["app"].state.vllm_config
    model, lora = config.model_config, config.lora_config
    here = Model(str(model.model), str(model.dtype).removeprefix("torch."), shape(model.hf_config.to_dict()))
    return {
        "incarnation": _incarnation(),
        "longest": model.max_model_len,
        "vocabulary": model.get_vocab_size(),
        "lora_rank": lora.max_lora_rank if lora else 0,
        "process": _PROCESS,
        **told(here),
    }


def _incarnation() -> int:
    return int(os.environ.get(INCARNATION, "0"))


async def _end(receive: Receive, send: Send) -> None:
    """Ends this process at once: its keeper sees to the rest of the session."""
    try:
        asked = read_json_text(await body(receive))
        incarnation, why = int(asked["incarnation"]), str(asked["why"])
    except (ValueError, KeyError, TypeError, OverflowError):  # JSON has Infinity here, which is no integer
        await refuse(send, 400, 'expected {"incarnation": NUMBER, "why": TEXT}', "BadRequest")
        return
    if incarnation != _incarnation():
        await refuse(send, 409, f"incarnation {incarnation} is gone, this is {_incarnation()}", "Conflict")
        return
    await answer(send, 200, {"incarnation": incarnation})
    print(f"A trainer asks for this server to be started again: {why[:2000]!r}", file=sys.stderr, flush=True)
    os._exit(ASKED)
