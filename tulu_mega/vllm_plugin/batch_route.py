"""A route of a vLLM server that takes a batch of prompts and computes the same bits for the same batch.

The last bits of a sequence's results depend on the sequences that are computed beside it, and these depend on when requests
arrive. vLLM's own routes take one prompt a request. This route takes all prompts of a batch in one request; the engine begins
when all of them wait in it, in order. So the schedule depends on the batch alone. One request also costs less than many.

ASGI middleware in the server's process, on top of vLLM's engine client.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
from typing import Any

from tulu_mega.vllm_plugin.asgi import App, Receive, Scope, Send, body
from tulu_mega.vllm_plugin.gate import ADAPTER
from tulu_mega.weight_transfer.adapters import ID, NAME, path

ROUTE = "/inference/tulu_mega/batch"
"""POST ``{"prompts": [{"token_ids", "sampling_params", "adapter"}, ...]}``; where ``adapter``, a name, is left out the model
itself answers. Answers a line of JSON for each prompt, as they end: ``{"place", "adapter", "choices": [{"index", "token_ids",
"logprobs", "finish_reason", "weight_versions"}, ...]}``, where ``adapter`` is the path of the one that answered or null;
``{"error"}`` ends it early."""


MAX_BODY = 1 << 30
"""Bytes of a batch: ten thousand prompts of four thousand tokens of five digits have 230 MiB, without spaces."""


ASKED = "tulu_mega.asked"
"""Name in the scope of a request's body as JSON, which `bounds` has read: the largest are read once."""


class Batches:
    """Middleware behind `bounds.Bounds`: answers `ROUTE` and passes every other request on."""

    def __init__(self, app: App):
        self._app = app
        self._adding = asyncio.Lock()
        self._numbers = itertools.count()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] != ROUTE:
            await self._app(scope, receive, send)
            return
        asked = scope[ASKED]["prompts"]
        await body(receive, MAX_BODY)  # what comes after it is that the client has gone
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"application/x-ndjson")]})
        answering = asyncio.create_task(self._answer(scope["app"].state, asked, send))
        leaving = asyncio.create_task(_left(receive))
        try:
            await asyncio.wait([answering, leaving], return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (answering, leaving):
                task.cancel()
            await asyncio.gather(answering, leaving, return_exceptions=True)

    async def _answer(self, state: Any, asked: list[dict[str, Any]], send: Send) -> None:
        engine = state.engine_client
        names = [f"tulu-mega-{next(self._numbers)}" for _ in asked]
        waiting: dict[asyncio.Task[Any], int] = {}
        try:
            collectors = await self._add(engine, names, asked, adapters(state))
            waiting |= {asyncio.create_task(_finished(collector)): place for place, collector in enumerate(collectors)}
            while waiting:
                done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                lines = [_told(waiting[task], task.result()) for task in done]
                for task in done:
                    del waiting[task]
                await send({"type": "http.response.body", "body": b"".join(lines), "more_body": True})
        except Exception as error:  # whatever it is, the one who asked is to know
            await send(
                {"type": "http.response.body", "body": _line({"error": f"{type(error).__name__}: {error}"}), "more_body": True}
            )
        finally:
            for task in waiting:
                task.cancel()
            if waiting:
                await asyncio.shield(engine.abort([names[place] for place in waiting.values()]))
        await send({"type": "http.response.body", "body": b""})

    async def _add(self, engine: Any, names: list[str], asked: list[dict[str, Any]], adapters: dict[str, Any]) -> list[Any]:
        """Puts all prompts into the engine before it computes any of them.

        Args:
            adapters: by name, as vLLM has them in a request.
        """
        from vllm import SamplingParams
        from vllm.inputs.engine import tokens_input
        from vllm.sampling_params import RequestOutputKind

        async with self._adding:
            if await engine.is_paused():
                raise RuntimeError("the server is paused")
            await engine.pause_generation(mode="keep", clear_cache=False)
            collectors = []
            try:
                for name, one in zip(names, asked, strict=True):
                    parameters = SamplingParams(**one["sampling_params"], logprobs=0, output_kind=RequestOutputKind.FINAL_ONLY)
                    adapter = adapters[one["adapter"]] if "adapter" in one else None
                    prompt = tokens_input(one["token_ids"])
                    collectors.append(await engine.add_request(name, prompt, parameters, lora_request=adapter))
            except BaseException:
                await asyncio.shield(engine.abort(names[: len(collectors)]))
                raise
            finally:
                await asyncio.shield(engine.resume_generation())
            return collectors


def adapter_names(state: Any) -> set[str]:
    """What requests may name: the trainer's adapter, once it has come, and those that the server was started with.

    Args:
        state: of vLLM's application.
    """
    begun = getattr(getattr(state, "openai_serving_models", None), "lora_requests", {})
    return {*begun, *([] if getattr(state, ADAPTER, None) is None else [NAME])}


def adapters(state: Any) -> dict[str, Any]:
    """The same as vLLM has them in a request, by name."""
    from vllm.lora.request import LoRARequest

    found = dict(state.openai_serving_models.lora_requests)
    if (version := getattr(state, ADAPTER, None)) is not None:
        found[NAME] = LoRARequest(NAME, ID, path(version))
    return found


def _told(place: int, output: Any) -> bytes:
    adapter = output.lora_request.lora_path if output.lora_request else None
    return _line({"place": place, "adapter": adapter, "choices": _choices(output)})


async def _finished(collector: Any) -> Any:
    """A prompt's output, once all of its responses have ended."""
    while not (output := collector.get_nowait() or await collector.get()).finished:
        pass
    return output


def _choices(output: Any) -> list[dict[str, Any]]:
    return [
        {
            "index": response.index,
            "token_ids": list(response.token_ids),
            "logprobs": [
                entry[token].logprob if entry and token in entry else None
                for token, entry in zip(response.token_ids, response.logprobs or (), strict=False)
            ],
            "finish_reason": response.finish_reason,
            "weight_versions": [
                {"version": span.version, "start": span.start, "end": span.end} for span in response.weight_versions or ()
            ],
        }
        for response in output.outputs
    ]


def _line(content: dict[str, Any]) -> bytes:
    return json.dumps(content).encode() + b"\n"


async def _left(receive: Receive) -> None:
    """Until the one who asked has gone."""
    with contextlib.suppress(asyncio.CancelledError):
        while (await receive())["type"] != "http.disconnect":
            pass
