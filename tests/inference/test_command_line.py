"""A server's command line and environment, and its share of a machine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tulu_mega.config import GrpoSettings, ModelSettings, RolloutSettings
from tulu_mega.errors import UserError
from tulu_mega.inference import for_run
from tulu_mega.inference.command_line import (
    ServerOptions,
    command,
    core_shares,
    device_names,
    device_shares,
    environment,
    sharing_obstacles,
)
from tulu_mega.preflight.check import check
from tulu_mega.quickstart import tiny_model
from tulu_mega.vllm_plugin.auth import KEY


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


@pytest.mark.parametrize(
    ("shown", "devices", "names"),
    [
        (None, [1, 2], ["1", "2"]),
        ("0,1,2,3", [2, 3], ["2", "3"]),
        ("4,5,6,7", [2, 3], ["6", "7"]),
        ("7, 3", [0, 1], ["7", "3"]),
        ("GPU-8932f937-d72c,GPU-5a2b9df3-11aa", [1], ["GPU-5a2b9df3-11aa"]),
        ("MIG-GPU-8932f937/1/0,MIG-3b5c", [1, 0], ["MIG-3b5c", "MIG-GPU-8932f937/1/0"]),
    ],
)
def test_gpus_keep_the_names_that_the_launcher_has_for_them(monkeypatch, shown, devices, names):
    """torch numbers those that it is shown; what is shown to a server is said in the driver's names."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if shown is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", shown)
    environ = environment(ServerOptions("DIR"), "key", 0, Path("/scratch"), None, devices)
    assert (
        environ["CUDA_VISIBLE_DEVICES"].split(",")
        == names
        == device_names(devices, {"CUDA_VISIBLE_DEVICES": shown} if shown else {})
    )


@pytest.fixture
def gpus(monkeypatch):
    """Has torch see so many GPUs."""

    def see(count: int) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)

    return see


@pytest.mark.parametrize(
    ("devices", "trainers", "values", "told"),
    [
        (0, 1, {"servers": 5}, []),
        (2, 1, {}, []),
        (8, 4, {"servers": 2, "tensor": 2, "transport": "nccl"}, []),
        (
            1,
            1,
            {},
            ["has to be set where GPUs are shared (1 GPU(s) for 1 rank(s) and 1 server(s) of 1", "at most 0.8, with the rest"],
        ),
        (1, 0, {"servers": 2}, ["2 workers of the servers share a GPU", "at most 0.47"]),
        (1, 1, {"gpu_memory": 0.8}, []),
        (1, 1, {"gpu_memory": 0.9}, ["gpu_memory = 0.9: 1 worker of the servers and a rank", "set it to 0.8 or less"]),
        (1, 1, {"servers": 2, "gpu_memory": 0.4}, []),
        (1, 1, {"servers": 2, "gpu_memory": 0.41}, ["gpu_memory = 0.41: 2 workers", "0.8 together; set it to 0.4 or less"]),
        (2, 0, {"servers": 6, "gpu_memory": 0.31}, []),
        (2, 0, {"servers": 6, "gpu_memory": 0.32}, ["3 workers of the servers share a GPU", "set it to 0.31 or less"]),
        (2, 2, {"gpu_memory": 0.3, "transport": "nccl"}, ["rollout.transport = 'nccl' joins each GPU once"]),
        (2, 0, {"tensor": 4}, ["rollout.tensor = 4: each worker needs a GPU, and this machine has 2"]),
    ],
)
def test_shared_gpus_are_told_of_before_anything_starts(gpus, devices, trainers, values, told):
    gpus(devices)
    found = " ".join(for_run.device_obstacles(RolloutSettings(**values), trainers))
    assert bool(found) == bool(told) and all(part in found for part in told), found


def test_nothing_is_started_on_gpus_that_do_not_do(gpus, tmp_path):
    gpus(1)
    with pytest.raises(UserError, match=r"rollout\.gpu_memory has to be set"):
        for_run.pool(ServerOptions("DIR"), RolloutSettings(), tmp_path, 1)
    assert for_run.pool(ServerOptions("DIR"), RolloutSettings(gpu_memory=0.3), tmp_path, 1).shared
    gpus(2)
    assert not for_run.pool(ServerOptions("DIR"), RolloutSettings(), tmp_path, 1).shared


def test_check_says_it_too(gpus, tmp_path):
    tiny_model.make(tmp_path / "model", seed=0)
    row = {"messages": [{"role": "user", "content": "2+2?"}], "ground_truth": "4", "dataset": "gsm8k"}
    (tmp_path / "prompts.jsonl").write_text(json.dumps(row))
    given = {
        "model": {"path": str(tmp_path / "model"), "dtype": "fp32"}, "run_dir": str(tmp_path / "run"),
        "data": {"train": str(tmp_path / "prompts.jsonl"), "max_prompt": 64}, "sampling": {"samples": 2, "max_tokens": 32},
    }  # fmt: skip
    gpus(1)
    (problem,) = check(GrpoSettings.model_validate(given))
    assert "rollout.gpu_memory has to be set" in problem
    assert check(GrpoSettings.model_validate({**given, "rollout": {"gpu_memory": 0.4}})) == []
    gpus(2)
    assert check(GrpoSettings.model_validate(given)) == []


def test_sharing_is_no_problem_of_pure_numbers_alone():
    assert sharing_obstacles([[4, 5], [6, 7]], devices=8, trainers=4, memory=None, transport="nccl", tensor=2) == []


def test_fp8_blocks_are_taken_as_they_are_sent(monkeypatch):
    for name in ("VLLM_USE_DEEP_GEMM_E8M0", "VLLM_USE_DEEP_GEMM"):
        monkeypatch.delenv(name, raising=False)

    def of(**options) -> dict[str, str]:
        return environment(ServerOptions("DIR", **options), "key", 0, Path("/scratch"), None, [0])

    assert of(fp8=True)["VLLM_USE_DEEP_GEMM_E8M0"] == "0" and "VLLM_USE_DEEP_GEMM" not in of(fp8=True)
    assert of(fp8=True, blackwell=True)["VLLM_USE_DEEP_GEMM"] == "0"
    assert not {"VLLM_USE_DEEP_GEMM_E8M0", "VLLM_USE_DEEP_GEMM"} & of(blackwell=True).keys()
    monkeypatch.setenv("VLLM_USE_DEEP_GEMM_E8M0", "1")
    assert of(fp8=True)["VLLM_USE_DEEP_GEMM_E8M0"] == "1", "whoever sets it knows better"


def test_a_model_s_weights_are_not_read_where_the_trainer_s_replace_them(tmp_path):
    tiny_model.make(tmp_path, seed=0)
    (tmp_path / "model.safetensors").unlink()

    def words(**rollout) -> list[str]:
        model = ModelSettings(path=str(tmp_path), dtype="fp32")
        return command(for_run.server_options(model, RolloutSettings(**rollout), None, ()), 0, True)

    assert "--load-format" not in words()
    random = words(random_weights=True)
    assert random[random.index("--load-format") + 1] == "dummy"


def test_a_server_has_no_expandable_segments(monkeypatch):
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:512,expandable_segments: True")
    monkeypatch.delenv("PYTORCH_ALLOC_CONF", raising=False)
    environ = environment(ServerOptions("DIR"), "key", 0, Path("/scratch"), None, [0])
    assert environ["PYTORCH_CUDA_ALLOC_CONF"] == "max_split_size_mb:512,expandable_segments: False"
    assert "PYTORCH_ALLOC_CONF" not in environ


def test_the_key_is_in_the_environment_alone_and_the_door_is_outermost(monkeypatch):
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "7")
    options = ServerOptions("DIR", extra=("--middleware", "a.b"))
    words = command(options, 0, on_cpu=True)
    environ = environment(options, "the key", 5, Path("/scratch"), [[0, 1], [2]], None)
    assert "the key" not in words and environ[KEY] == "the key"
    middleware = [word for before, word in zip(words, words[1:], strict=False) if before == "--middleware"]
    ours = "tulu_mega.vllm_plugin"
    assert middleware == [f"{ours}.batch_route.Batches", "a.b", f"{ours}.bounds.Bounds", f"{ours}.auth.Door"]
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
