"""A server's command line and environment."""

from __future__ import annotations

from pathlib import Path

import pytest

from tulu_mega.rollout.auth import KEY
from tulu_mega.rollout.serving import ServerOptions, command, core_shares, device_shares, environment


@pytest.mark.parametrize(
    ("cores", "servers", "tensor", "shares"),
    [
        (4, 2, 1, [[[0, 2]], [[1, 3]]]),
        (4, 1, 2, [[[0, 2], [1, 3]]]),
        (2, 2, 2, [[[0], [1]], [[0], [1]]]),
        (1, 2, 1, [[[0]], [[0]]]),
    ],
)
def test_cores_are_shared_out_while_there_are_enough(cores, servers, tensor, shares):
    assert core_shares(list(range(cores)), servers, tensor) == shares


@pytest.mark.parametrize(
    ("devices", "trainers", "servers", "tensor", "shares"),
    [(8, 4, 2, 2, [[4, 5], [6, 7]]), (4, 4, 2, 2, [[0, 1], [2, 3]]), (1, 1, 2, 1, [[0], [0]]), (8, 0, 1, 4, [[0, 1, 2, 3]])],
)
def test_servers_take_the_gpus_behind_the_trainer(devices, trainers, servers, tensor, shares):
    assert device_shares(devices, trainers, servers, tensor) == shares


def test_the_key_is_in_the_environment_alone_and_the_door_is_outermost(monkeypatch):
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "7")
    options = ServerOptions("DIR", extra=("--middleware", "a.b"))
    words = command(options, 0, on_cpu=True)
    environ = environment(options, "the key", 5, Path("/scratch"), [[0, 1], [2]], None)
    assert "the key" not in words and environ[KEY] == "the key"
    middleware = [word for before, word in zip(words, words[1:], strict=False) if before == "--middleware"]
    assert middleware == ["tulu_mega.rollout.batch.Batches", "a.b", "tulu_mega.rollout.auth.Door"]
    assert words[words.index("--host") + 1] == "127.0.0.1"
    assert environ["VLLM_CPU_OMP_THREADS_BIND"] == "0,1|2" and environ["VLLM_CPU_KVCACHE_SPACE"] == "7"
    assert "RANK" not in environ and "CUDA_VISIBLE_DEVICES" not in environ


def test_prompts_are_computed_whole_on_a_cpu_however_long():
    words = command(ServerOptions("DIR", max_model_len=20_000), 0, on_cpu=True)
    assert "--no-enable-chunked-prefill" in words and words[words.index("--max-num-batched-tokens") + 1] == "20000"
    assert "--no-enable-chunked-prefill" not in command(ServerOptions("DIR"), 0, on_cpu=False)


def test_a_single_worker_on_a_cpu_is_the_engine_itself():
    """As many threads as it has cores: vLLM binds the threads of workers beside the engine only."""
    environ = environment(ServerOptions("DIR"), "key", 0, Path("/scratch"), [[0, 1]], None)
    assert environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0" and environ["OMP_NUM_THREADS"] == "2"
    words = command(ServerOptions("DIR"), 0, on_cpu=True)
    assert words[words.index("--distributed-executor-backend") + 1] == "uni"
    assert "uni" not in command(ServerOptions("DIR", tensor=2), 0, on_cpu=True)
    assert "VLLM_ENABLE_V1_MULTIPROCESSING" not in environment(ServerOptions("DIR"), "key", 0, Path("/"), [[0], [1]], None)
