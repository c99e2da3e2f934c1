"""Adapters that a model is asked with: which vLLM holds apart, which are merged, and what is wrong with others."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.lib import adapter_files
from tulu_mega.config import GenerateSettings, ModelSettings, ServeSettings
from tulu_mega.config.lora import LoraSettings
from tulu_mega.errors import UserError
from tulu_mega.inference import adapters
from tulu_mega.inference.command_line import ServerOptions, command, lora_arguments
from tulu_mega.inference.generate import prepared
from tulu_mega.inference.reply import check_adapter


@pytest.fixture
def adapter(tiny, tmp_path) -> Path:
    return adapter_files.make(tmp_path / "adapter", tiny)


def changed(adapter: Path, **told: object) -> Path:
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | told))
    return adapter


def test_a_server_has_one_slot_more_than_adapters_and_leaves_the_head_alone():
    words = command(ServerOptions("DIR", lora_rank=9, adapter="A"), 0, on_cpu=True)
    at = words.index("--enable-lora")
    assert words[at + 1 : at + 5] == ["--max-lora-rank", "16", "--max-loras", "3"]
    assert "adapter=A" in words and "q_proj" in words and "lm_head" not in words
    assert "--enable-lora" not in command(ServerOptions("DIR"), 0, on_cpu=True)
    assert lora_arguments(1)["max_lora_rank"] == 1 and lora_arguments(512)["max_lora_rank"] == 512


def test_what_vllm_cannot_hold_apart_is_merged():
    fresh = adapters.described("DIR", LoraSettings(rank=16))
    assert adapters.holds(fresh, merged=False)[0] == 16
    rank, why = adapters.holds(fresh, merged=True)
    assert rank == 0 and "rollout.adapters = 'merged'" in why
    for told, reason in (
        ({"use_dora": True}, "use_dora is set"),
        ({"rank_pattern": {"q_proj": 600}}, "rank 600 is above 512"),
        ({"modules_to_save": ["lm_head"]}, "lm_head is saved whole"),
        ({"bias": "all"}, "bias is 'all'"),
    ):
        rank, why = adapters.holds(fresh | told, merged=False)
        assert rank == 0 and reason in why


def test_an_adapter_that_vllm_cannot_hold_is_added_to_the_weights_for_as_long_as_they_are_served(tiny, tmp_path):
    wide = adapter_files.make(tmp_path / "wide", tiny, rank=513)
    with adapters.served(str(tiny), str(wide)) as model:
        assert model.adapter is None
        merged, base = (load_file(Path(each, "model.safetensors")) for each in (model.model, tiny))
        name = "model.layers.0.mlp.down_proj"
        a, b = (load_file(wide / "adapter_model.safetensors")[f"base_model.model.{name}.lora_{w}.weight"] for w in "AB")
        torch.testing.assert_close(merged[f"{name}.weight"], base[f"{name}.weight"] + 2.0 * b @ a, rtol=1e-5, atol=1e-5)
    assert not Path(model.model).exists()
    assert any("the merged weights are served" in line for line in adapters.checked(str(tiny), str(wide)))


def test_a_fitting_adapter_goes_to_vllm_as_it_is(tiny, adapter):
    with adapters.served(str(tiny), str(adapter)) as model:
        assert (model.model, model.adapter, model.rank) == (str(tiny), str(adapter), 3)
    (line,) = adapters.checked(str(tiny), str(adapter))
    assert line == f"adapter = {adapter}: vLLM holds it apart from the model's weights"
    (other, _) = adapters.checked(str(tiny), str(changed(adapter, base_model_name_or_path="owner/other")))
    assert "was made for owner/other; here it goes with model.path" in other


def without(adapter: Path, name: str) -> None:
    (adapter / name).unlink()


def other_shape(adapter: Path) -> None:
    file = adapter / "adapter_model.safetensors"
    save_file({name: torch.cat([value, value], dim=-1) for name, value in load_file(file).items()}, file)


BAD = {
    "no directory": (shutil.rmtree, "no such directory; expected adapters as PEFT saves them"),
    "no configuration": (lambda adapter: without(adapter, "adapter_config.json"), "adapter_config.json: no such file"),
    "no weights": (lambda adapter: without(adapter, "adapter_model.safetensors"), "adapter_model.safetensors: no such file"),
    "another shape": (other_shape, "does not belong to the model; name one that was made for it"),
    "no module of the model's": (lambda adapter: changed(adapter, target_modules=["wq"]), "wq: expected 'all-linear' or some of"),
    "a reward model's": (lambda adapter: changed(adapter, task_type="SEQ_CLS"), "is a reward model's, and the model here is a"),
}


@pytest.mark.parametrize(("break_it", "told"), BAD.values(), ids=BAD)
def test_bad_adapters_are_told_before_anything_starts(tiny, adapter, break_it, told):
    break_it(adapter)
    settings = GenerateSettings(model=ModelSettings(path=str(tiny), dtype="fp32"), adapter=str(adapter))
    with pytest.raises(UserError) as failure:
        prepared(settings)
    assert told in "\n".join(failure.value.problems)
    assert all("\n" not in problem for problem in failure.value.problems)


def test_servers_of_fp8_blocks_hold_none(tiny):
    model = {"path": str(tiny), "dtype": "bf16"}
    with pytest.raises(ValueError, match="adapter and lora_rank do not go with rollout"):
        ServeSettings(model=model, lora_rank=8, rollout={"quantization": "fp8"})


def test_an_answer_of_another_adapter_is_not_taken():
    check_adapter({"adapter": "memory://policy/7"}, "memory://policy/7")
    check_adapter({}, None)
    for given, wanted in ((None, "memory://policy/7"), ("memory://policy/6", "memory://policy/7"), ("memory://policy/7", None)):
        with pytest.raises(ValueError, match="answered by adapter"):
            check_adapter({"adapter": given}, wanted)
