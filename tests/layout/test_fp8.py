"""`[precision]`: what it sets, what it asks of settings, machine and model, and what packing makes of it."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from transformers import LlamaConfig

from tests.layout.test_stages import LLAMA_405B
from tulu_mega import cli
from tulu_mega.config import GrpoSettings, PrecisionSettings, RolloutSettings, ScoreSettings, ServeSettings, SftSettings, load
from tulu_mega.errors import UserError
from tulu_mega.inference.command_line import ServerOptions, command
from tulu_mega.launch import launcher
from tulu_mega.layout.alignment import alignment
from tulu_mega.layout.fp8 import fp8_problems, rollout_fp8_problems
from tulu_mega.layout.hardware import GPUS
from tulu_mega.layout.packing_rules import pack_alignment
from tulu_mega.plan.model.parameters import model_parameters
from tulu_mega.plan.model.rollouts import Servers, server_memory
from tulu_mega.platforms import fp8
from tulu_mega.platforms.fp8 import Machine, obstacles, this_machine
from tulu_mega.preflight import check

FLAGS = {"model": "dir", "run_dir": "run", "data.train": "a.jsonl"}
H100 = Machine(capability=(9, 0), cuda=(12, 9), engine=(2, 8, 0))

UNFUSED = {"megatron__apply_rope_fusion": "false"}
"""Transformer Engine's kernel, which is not installed beside these tests."""


def settings(**flags) -> SftSettings:
    given = {**FLAGS, **{name.replace("__", "."): str(value) for name, value in flags.items()}}
    return load(SftSettings, None, [f"--{name}={value}" for name, value in given.items()])


def problems(**flags) -> str:
    with pytest.raises(UserError) as caught:
        settings(**flags)
    return "\n".join(caught.value.problems)


@pytest.mark.parametrize(("recipe", "format"), [("delayed", "hybrid"), ("tensorwise", "hybrid"), ("blockwise", "e4m3")])
def test_megatron_core_gets_the_recipe(recipe, format):
    from tulu_mega.model.config import transformer_config

    hf = LlamaConfig(**LLAMA_405B)
    config = transformer_config(hf, settings(precision=recipe, **UNFUSED), transformer_engine=True)
    assert (config.fp8, config.fp8_recipe, config.fp8_param, config.bf16) == (format, recipe, False, True)
    assert not config.first_last_layers_bf16
    assert (config.fp8_amax_history_len, config.fp8_amax_compute_algo) == (
        (1024, "max") if recipe == "delayed" else (1, "most_recent")
    )


def test_layers_in_bf16():
    from megatron.core.fp8_utils import is_first_last_bf16_layer

    from tulu_mega.model.config import transformer_config

    asked = settings(precision__fp8="tensorwise", precision__first_bf16=2, precision__last_bf16=1, **UNFUSED)
    config = transformer_config(LlamaConfig(**LLAMA_405B), asked, transformer_engine=True)
    kept = [layer for layer in range(config.num_layers) if is_first_last_bf16_layer(config, layer)]
    assert kept == [0, 1, config.num_layers - 1]


def test_a_dry_run_of_fp8_that_recomputes_norms_is_built():
    """Without Transformer Engine there is no version of it for megatron-core to compare."""
    from tulu_mega.model.config import transformer_config

    asked = settings(precision__fp8="tensorwise", model__recompute=["layernorm", "activation"])
    assert transformer_config(LlamaConfig(**LLAMA_405B), asked, transformer_engine=False).recompute_granularity is None


def test_weights_kept_in_fp8():
    from tulu_mega.model.config import transformer_config

    asked = settings(precision__fp8="blockwise", precision__fp8_param_gather="true", **UNFUSED)
    assert transformer_config(LlamaConfig(**LLAMA_405B), asked, transformer_engine=True).fp8_param
    gather = dict(precision__fp8_param_gather="true")
    assert "needs precision.fp8 = 'tensorwise' or 'blockwise', got 'off'" in problems(**gather)
    assert "needs precision.fp8 = 'tensorwise' or 'blockwise', got 'delayed'" in problems(precision__fp8="delayed", **gather)
    gather["precision__fp8"] = "tensorwise"
    assert "needs parallel.distributed_optimizer" in problems(parallel__distributed_optimizer="false", **gather)
    assert "needs optim.name = 'adamw', got 'sgd'" in problems(optim__name="sgd", **gather)
    assert "fp8_param is decided by precision.fp8_param_gather" in problems(megatron__fp8_param="true")


def test_off_sets_nothing():
    assert PrecisionSettings().megatron == {} and settings().precision.recipe is None


def test_settings_that_contradict_are_refused():
    assert "all layers in FP8" in problems(precision__fp8="delayed", precision__first_bf16=1)
    assert "all layers are in bf16" in problems(precision__last_bf16=1)
    assert "model.dtype = 'bf16', got 'fp32'" in problems(precision="tensorwise", model__dtype="fp32")
    assert "model.spec = 'local'" in problems(precision="tensorwise", model__spec="local")
    for name, value in {"fp8": "hybrid", "fp8_recipe": "blockwise", "num_layers_at_end_in_bf16": 2}.items():
        assert f"{name} is decided by precision." in problems(**{f"megatron__{name}": value})


@pytest.mark.parametrize("recipe", ["delayed", "tensorwise", "blockwise"])
def test_an_h100_has_what_it_takes(recipe):
    assert obstacles(recipe, H100) == []


@pytest.mark.parametrize(
    ("recipe", "changed", "told"),
    [
        ("tensorwise", {"engine": None}, ["Transformer Engine, which is not installed here; pip install"]),
        ("tensorwise", {"engine": (2, 1)}, ["Transformer Engine 2.2, found 2.1; update it"]),
        ("blockwise", {"engine": (2, 2, 5)}, ["Transformer Engine 2.3, found 2.2.5; update it"]),
        ("delayed", {"capability": (8, 0)}, ["compute capability 8.9 (L40 or H100 or newer), found 8.0"]),
        ("blockwise", {"capability": (8, 9)}, ["compute capability 9.0 (H100 or newer), found 8.9"]),
        ("blockwise", {"cuda": (12, 8)}, ["CUDA 12.9, torch was built with 12.8", "tensorwise"]),
        ("tensorwise", {"cuda": (12, 4)}, []),
        ("tensorwise", {"capability": (8, 9)}, []),
        ("blockwise", {"capability": (10, 0), "cuda": (13, 0)}, []),
        ("delayed", {"capability": None, "cuda": None, "engine": None}, ["not installed", "torch sees none here"]),
        ("blockwise", {"capability": (8, 0), "cuda": (12, 1), "engine": (1, 9)}, ["found 1.9", "found 8.0", "built with 12.1"]),
    ],
)
def test_what_a_machine_lacks_is_told_at_once(recipe, changed, told):
    found = obstacles(recipe, replace(H100, **changed))
    assert bool(found) == bool(told)
    assert all(part in "\n".join(found) for part in told)
    assert all(each.startswith(f"precision.fp8 = '{recipe}' needs") and "; " in each for each in found)


def test_check_tells_it_before_anything_is_loaded(tmp_path):
    if this_machine().capability is not None:
        pytest.skip("this machine has a CUDA device")
    asked = load(ScoreSettings, None, ["--model", str(tmp_path), "--precision=blockwise", "--input=a", "--output=b"])
    found = check.check(asked)
    assert any("needs a CUDA device" in each for each in found) and any("config.json" in each for each in found)


CONFIG = LlamaConfig(**LLAMA_405B).to_dict()


def test_shards_have_to_be_multiples():
    asked = settings(precision="blockwise", parallel__tensor=8)
    assert fp8_problems(CONFIG, asked) == []
    small = {**CONFIG, "hidden_size": 1088, "intermediate_size": 8 * 100}  # 100 rows on a rank
    assert [each.split(" are ")[1].split(";")[0] for each in fp8_problems(small, asked)] == ["1088", "100"]
    assert fp8_problems({**small, "intermediate_size": 1024}, settings(precision="tensorwise", parallel__tensor=8)) == []
    assert fp8_problems(small, settings(parallel__tensor=8)) == []
    (late,) = fp8_problems(CONFIG, settings(precision__fp8="blockwise", precision__last_bf16=100, parallel__pipeline=2))
    assert late.startswith("precision.last_bf16 = 100: megatron-core keeps at most 63")


@pytest.mark.parametrize(("recipe", "multiple"), [("off", 1), ("delayed", 16), ("tensorwise", 16), ("blockwise", 128)])
def test_packs_are_aligned(recipe, multiple):
    asked = settings(precision=recipe, parallel__tensor=2, parallel__context=2)
    assert pack_alignment(asked) == alignment(2, True, 2, None if recipe == "off" else recipe)
    assert pack_alignment(asked).total == 4 * multiple


def test_block_scales_are_vllms(monkeypatch):
    """Transformer Engine reads its variables on import: they are set before any rank starts."""
    monkeypatch.setenv("RANK", "0")
    for name in ("WORLD_SIZE", "MASTER_ADDR"):
        monkeypatch.setenv(name, "1")
    name = "NVTE_FP8_BLOCK_SCALING_FP32_SCALES"
    for recipe, want in (("tensorwise", None), ("blockwise", "1")):
        monkeypatch.setenv(name, "x")
        monkeypatch.delenv(name)
        with pytest.raises(UserError, match="LOCAL_RANK"):  # the world is looked at next
            launcher.run("os:getpid", settings(precision=recipe), [], lambda _: None)
        assert launcher.os.environ.get(name) == want


# Rollouts


GRPO = ["--model=dir", "--run_dir=run", "--data.train=a.jsonl", "--rollout.quantization=fp8"]


def test_servers_in_fp8_are_in_bf16():
    assert load(GrpoSettings, None, GRPO).rollout.quantization == "fp8"
    load(GrpoSettings, None, [*GRPO, "--model.dtype=fp32", "--rollout.dtype=bf16"])
    for kind, flags in {
        GrpoSettings: [*GRPO, "--rollout.dtype=fp32"],
        ServeSettings: ["--model=dir", "--rollout.quantization=fp8", "--model.dtype=fp32"],
    }.items():
        want = r"^rollout.quantization = 'fp8' needs servers in bf16, got 'fp32'.*set rollout.dtype to 'bf16'"
        with pytest.raises(UserError, match=want):
            load(kind, None, flags)


def test_workers_have_whole_blocks():
    def found(tensor):
        return rollout_fp8_problems(CONFIG, RolloutSettings(quantization="fp8", tensor=tensor))

    assert found(1) == found(8) == []
    assert found(16) == []  # a key head each: 128 channels
    odd = {**CONFIG, "intermediate_size": 384}
    (told,) = rollout_fp8_problems(odd, RolloutSettings(quantization="fp8", tensor=2))
    assert "intermediate_size on a worker are 192; lower rollout.tensor or set" in told
    (told,) = rollout_fp8_problems({**odd, "intermediate_size": 416}, RolloutSettings(quantization="fp8", tensor=4))
    assert "intermediate_size on a worker are 104; set rollout.quantization to 'none'" in told  # no layout helps
    assert rollout_fp8_problems(odd, RolloutSettings(tensor=2)) == []


def test_a_cpu_without_amx_is_told(monkeypatch):
    monkeypatch.setattr(fp8.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(fp8.torch.cpu, "_is_amx_tile_supported", lambda: False)
    (told,) = fp8.server_obstacles()
    assert "needs GPUs or a CPU with AMX" in told
    monkeypatch.setattr(fp8.torch.cpu, "_is_amx_tile_supported", lambda: True)
    assert fp8.server_obstacles() == []


def test_servers_that_would_fail_are_not_started(monkeypatch, tmp_path, capsys):
    pytest.importorskip("vllm")
    monkeypatch.setattr(fp8.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(fp8.torch.cpu, "_is_amx_tile_supported", lambda: False)
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, "intermediate_size": 416}))
    flags = ["serve", "--model.path", str(tmp_path), "--rollout.quantization", "fp8"]
    for arguments in (flags, ["check", *flags]):
        assert cli.main(arguments) == 2
        shape, machine = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error: "))
        assert "intermediate_size on a worker are 416" in shape and "CPU with AMX" in machine


def test_a_server_is_started_as_of_a_quantized_checkpoint():
    words = command(ServerOptions("dir", dtype="bfloat16", fp8=True), port=0, on_cpu=False)
    assert '"weight_block_size": [128, 128]' in words[words.index("--hf-overrides") + 1]
    assert words[words.index("--load-format") + 1] == "dummy"
    assert "--hf-overrides" not in command(ServerOptions("dir"), port=0, on_cpu=False)


def test_the_planner_counts_a_byte_for_the_layers_matrices():
    plain = Servers(1, 8, GPUS["h100"], 16, 0.9, 2, 256 * 2**20)
    both = [server_memory(CONFIG, servers).weights * 8 for servers in (plain, replace(plain, fp8=True))]
    assert both[0] == 2 * model_parameters(CONFIG)
    layers = CONFIG["num_hidden_layers"] * 16384 * (2 * 16384 + 2 * 1024 + 3 * CONFIG["intermediate_size"])
    assert both[0] - both[1] == layers
