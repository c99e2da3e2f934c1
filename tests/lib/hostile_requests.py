"""Requests that end a vLLM server, or stop it from serving, where nobody looks at them; and random ones."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any

from tulu_mega.vllm_plugin.batch_route import ROUTE
from tulu_mega.vllm_plugin.bounds import GENERATE, ROUTES
from tulu_mega.weight_transfer.protocol import Bucket, Expected, Place, begin_message, bucket_message, commit_message

ENDLESS = b"[" * 100_000
HOSTILE = [
    (ROUTE, {"prompts": [{"token_ids": [5, 10**6], "sampling_params": {"max_tokens": 2}}]}),
    (ROUTE, {"prompts": [{"token_ids": [5], "sampling_params": {"max_tokens": 2, "logits_processors": ["os:system"]}}]}),
    (ROUTE, {"prompts": [{"token_ids": [5], "sampling_params": {"max_tokens": 2, "n": 10**9}}]}),
    (ROUTE, ENDLESS),
    (GENERATE, {"token_ids": [10**6], "sampling_params": {"max_tokens": 2}}),
    (GENERATE, {"token_ids": [5], "sampling_params": {"max_tokens": 2, "structured_outputs": {"regex": "(a+)+b"}}}),
    (GENERATE, ENDLESS),
    ("/collective_rpc", {"method": "no_such_method"}),
    ("/collective_rpc", {"method": "shutdown"}),
    ("/collective_rpc", ENDLESS),
    ("/init_weight_transfer_engine", {"init_info": None}),
    ("/init_weight_transfer_engine", {"init_info": {"endpoints": [], "timeout": "x"}}),
    ("/start_weight_update", {}),
    ("/update_weights", {"update_info": {"begin": [], "bucket": 7}}),
    ("/update_weights", {"update_info": {"commit": {"version": [], "checksums": 3}}}),
    ("/finish_weight_update", {"weight_version": 7}),
    ("/finish_weight_update", {"weight_version": "7"}),
    ("/weight_checker", {"action": "reset"}),
    ("/sleep", {}),
    ("/v1/completions", {"prompt": "x"}),
]


_PROMPT = {"token_ids": [5, 6], "sampling_params": {"max_tokens": 2, "n": 1, "seed": 3}}
_MESSAGES = (
    begin_message(3, {"a": Expected((2, 3), "float32", 0)}, True),
    begin_message(3, {"a": Expected((2, 3), "float32", 0)}, True, {"r": 3, "lora_alpha": 6, "target_modules": ["q"]}, "word"),
    bucket_message(3, Bucket(0, 0, (Place("a", 0, 24),))),
    commit_message(3, {"a": "ab"}),
)
_SOUND: dict[str, tuple[Any, ...]] = {
    ROUTE: ({"prompts": [_PROMPT, _PROMPT]}, {"prompts": [_PROMPT | {"adapter": "policy"}]}),
    GENERATE: (_PROMPT,),
    "/collective_rpc": ({"method": "weights_status", "timeout": 3},),
    "/update_weights": tuple({"update_info": each} for each in _MESSAGES),
    "/init_weight_transfer_engine": ({"init_info": {"endpoints": {"0": {"kind": "shm", "name": "x"}}, "timeout": 1.0}},),
    "/update_weight_version": ({"new_version": "3"},),
    "/finish_weight_update": ({"weight_version": "3"},),
    "/weight_checker": ({"action": "checksum"},),
}
_ODD = (None, True, -1, 0, 1.5, 1 << 40, 10**30, "", "x", "x" * 3000, [], {}, [{}], {"x": None}, float("nan"), float("inf"))
_PIECES = (b"{", b"}", b"[", b"]", b'"', b":", b",", b"1e999", b"-1", b"null", b"\xff", b"\x00", b"0" * 5000, ENDLESS[:2000])


def random_requests(draw: random.Random, count: int) -> Iterator[tuple[str, str, bytes]]:
    """Method, path and body of requests to every route in turn but those that pause a server: sound bodies with values or bytes
    changed."""
    routes = [asked for asked in ROUTES if asked[1] not in ("/pause", "/resume", "/update_weight_version")]
    for number in range(count):
        method, path = routes[number % len(routes)]
        sound = json.loads(json.dumps(draw.choice(_SOUND.get(path, ({},)))))
        for _ in range(draw.randint(0, 3)):
            _change(draw, sound)
        content = bytearray(json.dumps(sound).encode())
        while draw.random() < 0.3:
            at = draw.randint(0, len(content))
            content[at : at + draw.randint(0, 5)] = draw.choice(_PIECES)
        yield method, path, bytes(content)


def _change(draw: random.Random, value: Any) -> None:
    """Puts something else into a place within a document."""
    while isinstance(value, dict | list) and value:
        key = draw.choice(list(value)) if isinstance(value, dict) else draw.randrange(len(value))
        if draw.random() < 0.4:
            value[key] = json.loads(json.dumps(draw.choice(_ODD)))
            return
        value = value[key]
