"""Requests that end a vLLM server, or stop it from serving, where nobody looks at them."""

from __future__ import annotations

from tulu_mega.vllm_plugin.batch_route import ROUTE
from tulu_mega.vllm_plugin.bounds import GENERATE

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
    ("/sleep", {}),
    ("/v1/completions", {"prompt": "x"}),
]
