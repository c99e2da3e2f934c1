"""Limits of what a vLLM server for training accepts from clients with its key: which routes, and which bodies.

vLLM trusts its clients: a token id beyond the vocabulary ends its engine, a method that no worker has leaves
``/collective_rpc`` waiting, deeply nested brackets end in an error of the server. This ASGI middleware, right behind the door,
answers a broken trainer, or one of another version, with what is wrong, and keeps the server ready for the next request.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from tulu_mega.outside.json_input import read_json_text
from tulu_mega.vllm_plugin.asgi import App, Receive, Scope, Send, body, refuse
from tulu_mega.vllm_plugin.batch_route import ASKED, MAX_BODY, ROUTE, adapter_names

METHODS = frozenset(("weights_status", "arrived_checksums"))
"""Methods of workers that may be called through ``/collective_rpc``: those that only report."""
MAX_OTHER = 1 << 26
"""Bytes of any other request. The longest says which tensors an update has: some megabytes."""
MAX_SAMPLES, MAX_SEED, MAX_IDS = 4096, 1 << 62, 1 << 20
GENERATE, RPC = "/inference/v1/generate", "/collective_rpc"

Problem = str | None
Check = Callable[[Any, Scope], Problem]


class Bounds:
    """Middleware: refuses what is not in `ROUTES` with status 404 and a body that is out of bounds with 400 or 413."""

    def __init__(self, app: App):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        asked = (scope["method"], scope["path"])
        if asked not in ROUTES:
            await refuse(send, 404, f"{asked[0]} {asked[1][:200]} is not served here", "NotFound")
            return
        try:
            content = await body(receive, MAX_BODY if asked == ("POST", ROUTE) else MAX_OTHER)
        except ValueError as error:
            await refuse(send, 413, str(error), "TooLarge")
            return
        said, problem = _read(content, ROUTES[asked], scope)
        if problem is not None:
            await refuse(send, 400, f"{asked[1]}: {problem}", "BadRequest")
            return
        if asked == ("POST", RPC):
            content = json.dumps({"method": said["method"]}).encode()  # see `_method`
        await self._app({**scope, ASKED: said}, _again(content, receive), send)


def _read(content: bytes, check: Check | None, scope: Scope) -> tuple[Any, Problem]:
    """Read a request's body: return its content and what is wrong with it. An empty body without a check is fine."""
    if not content:
        return None, None if check is None else "the body is empty, expected JSON"
    try:
        asked = read_json_text(content.decode("utf-8"))
    except ValueError as error:
        return None, f"expected JSON ({str(error)[:200]})"
    return asked, check(asked, scope) if check is not None else None


def _again(content: bytes, receive: Receive) -> Receive:
    """Return a `receive` that gives a body which was read already; later messages, such as the client's leaving, pass through."""
    given = False

    async def receive_again() -> dict[str, Any]:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": content, "more_body": False}

    return receive_again


# -- checks of bodies -------------------------------------------------------------------------------------------------------


def _batch(asked: Any, scope: Scope) -> Problem:
    prompts = asked.get("prompts") if type(asked) is dict else None
    if type(prompts) is not list or set(asked) != {"prompts"}:
        return 'expected {"prompts": [...]}'
    known = adapter_names(scope["app"].state)
    for place, prompt in enumerate(prompts):
        if type(prompt) is not dict or set(prompt) - {"adapter"} != {"token_ids", "sampling_params"}:
            return f'prompt {place}: expected {{"token_ids", "sampling_params"}} and at most "adapter"'
        if "adapter" in prompt and (type(prompt["adapter"]) is not str or prompt["adapter"] not in known):
            here = f"it has {', '.join(sorted(known))}" if known else "it has none"
            return f"prompt {place}: this server has no adapter {str(prompt['adapter'])[:100]!r}; {here}"
        if problem := _prompt(prompt, scope):
            return f"prompt {place}: {problem}"
    return None


def _generate(asked: Any, scope: Scope) -> Problem:
    known = {"token_ids", "sampling_params", "model", "request_id", "stream"}
    if type(asked) is not dict or not {"token_ids", "sampling_params"} <= set(asked) <= known:
        return f"expected an object of token_ids, sampling_params and at most {', '.join(sorted(known))}"
    return _prompt(asked, scope)


def _prompt(asked: Mapping[str, Any], scope: Scope) -> Problem:
    """What is wrong with `token_ids` and `sampling_params`."""
    model = scope["app"].state.vllm_config.model_config
    longest, vocabulary = model.max_model_len, model.get_vocab_size()
    ids, sampling = asked["token_ids"], asked["sampling_params"]
    if not _ids(ids, vocabulary) or not 0 < len(ids) < longest:
        return f"token_ids: expected 1 to {longest - 1} whole numbers from 0 to {vocabulary - 1}"
    if type(sampling) is not dict:
        return "sampling_params: expected an object"
    for name, value in sampling.items():
        if name not in SAMPLING:
            return f"sampling_params.{str(name)[:100]} is not taken, expected some of {', '.join(SAMPLING)}"
        if value is not None and not SAMPLING[name](value, vocabulary, longest):
            return f"sampling_params.{name} = {str(value)[:100]} is out of bounds"
    return None


def _ids(value: Any, vocabulary: int) -> bool:
    return type(value) is list and len(value) <= MAX_IDS and all(type(each) is int and 0 <= each < vocabulary for each in value)


def _whole(least: int, most: int) -> Callable[[Any, int, int], bool]:
    return lambda value, _vocabulary, _longest: type(value) is int and least <= value <= most


def _number(least: float, most: float) -> Callable[[Any, int, int], bool]:
    # a truth is no number; what is not finite is in no range
    return lambda value, _vocabulary, _longest: type(value) in (int, float) and least <= value <= most


def _truth(value: Any, _vocabulary: int, _longest: int) -> bool:
    return type(value) is bool


def _length(value: Any, _vocabulary: int, longest: int) -> bool:
    return type(value) is int and 0 < value <= longest


SAMPLING: dict[str, Callable[[Any, int, int], bool]] = {
    "n": _whole(1, MAX_SAMPLES),
    "temperature": _number(0, 100),
    "top_p": _number(1e-6, 1),
    "top_k": _whole(-1, 1 << 30),
    "min_p": _number(0, 1),
    "max_tokens": _length,
    "min_tokens": lambda value, _vocabulary, longest: type(value) is int and 0 <= value <= longest,
    "seed": _whole(-MAX_SEED, MAX_SEED),
    "stop_token_ids": lambda value, vocabulary, _longest: _ids(value, vocabulary),
    "allowed_token_ids": lambda value, vocabulary, _longest: _ids(value, vocabulary) and len(value) > 0,
    "ignore_eos": _truth,
    "detokenize": lambda value, _vocabulary, _longest: value is False,
    "logprobs": _whole(0, 20),
    "presence_penalty": _number(-2, 2),
    "frequency_penalty": _number(-2, 2),
    "repetition_penalty": _number(1e-3, 100),
}
"""Of vLLM's SamplingParams what is taken, by name, with what a value must be; null stands for vLLM's default."""


def _method(asked: Any, _scope: Scope) -> Problem:
    """Check a call of a method. A time-out, which older trainers send, is accepted and not passed on.

    vLLM's executor leaves the reply of a call whose time is over in its queue, takes it for the next call's, and soon for that of
    a forward pass, which ends the engine (`MultiprocExecutor.collective_rpc`).
    """
    if type(asked) is not dict or type(asked.get("method")) is not str or asked["method"] not in METHODS:
        return f"expected a method that is one of {', '.join(sorted(METHODS))}"
    timeout = asked.get("timeout")
    if not set(asked) <= {"method", "timeout"} or not (timeout is None or _number(0, 86_400)(timeout, 0, 0)):
        return "expected no arguments beside a time-out in seconds"
    return None


def _holds(name: str, kind: type, optional: bool = False) -> Check:
    def check(asked: Any, _scope: Scope) -> Problem:
        if type(asked) is dict and set(asked) == {name} and (type(asked[name]) is kind or (optional and asked[name] is None)):
            return None
        return f"expected an object of {name} alone, of type {kind.__name__}"

    return check


ROUTES: dict[tuple[str, str], Check | None] = {
    ("GET", "/health"): None,
    ("GET", "/version"): None,
    ("GET", "/metrics"): None,
    ("GET", "/v1/models"): None,
    ("GET", "/is_paused"): None,
    ("GET", "/weight_info"): None,
    ("GET", "/get_world_size"): None,
    ("POST", "/pause"): None,
    ("POST", "/resume"): None,
    ("POST", "/reset_prefix_cache"): None,
    ("POST", "/abort_requests"): lambda asked, _scope: None if asked == {} else "expected {}, which ends all requests",
    ("POST", "/update_weight_version"): _holds("new_version", str),
    # its other action, "reset", gives the model random weights, of which nobody is told
    ("POST", "/weight_checker"): lambda asked, _scope: (
        None if asked == {"action": "checksum"} else 'expected {"action": "checksum"}, which changes nothing'
    ),
    ("POST", "/init_weight_transfer_engine"): _holds("init_info", dict),
    ("POST", "/start_weight_update"): None,
    ("POST", "/update_weights"): _holds("update_info", dict),
    ("POST", "/finish_weight_update"): _holds("weight_version", str, optional=True),  # null after a rehearsal
    ("POST", RPC): _method,
    ("POST", GENERATE): _generate,
    ("POST", ROUTE): _batch,
}
"""Method and path -> what its body must be."""
