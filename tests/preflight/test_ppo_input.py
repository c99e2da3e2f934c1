"""What `check` says of a value model that will not do."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.invariant import material
from tests.invariant.stages import HIDDEN
from tests.lib.grpo_runs import reward_model
from tulu_mega.config import PpoSettings
from tulu_mega.preflight.check import check


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    directory = tmp_path_factory.mktemp("ppo")
    material.make_model(directory / "model", hidden=HIDDEN)
    reward_model(directory / "model", directory / "rm")
    shutil.copytree(directory / "rm", directory / "other")
    content = json.loads((directory / "rm/config.json").read_text())
    (directory / "other/config.json").write_text(json.dumps(content | {"vocab_size": 1000}))
    weights = load_file(directory / "rm/model.safetensors")
    embedding = next(name for name in weights if "embed_tokens" in name)
    weights[embedding] = np.zeros((1000, weights[embedding].shape[1]), np.float32)
    save_file(weights, directory / "other/model.safetensors")
    shutil.copytree(directory / "rm", directory / "short")
    (directory / "short/config.json").write_text(json.dumps(content | {"max_position_embeddings": 79}))
    shutil.copytree(directory / "rm", directory / "shifted")
    tokenizer = json.loads((directory / "rm/tokenizer.json").read_text())
    ids = tokenizer["model"]["vocab"]
    ids["b"], ids["c"] = ids["c"], ids["b"]
    (directory / "shifted/tokenizer.json").write_text(json.dumps(tokenizer))
    shutil.copytree(directory / "rm", directory / "bare")  # a model that is only given ids needs no tokenizer
    for file in (directory / "bare").glob("tokenizer*"):
        file.unlink()
    row = {"messages": [{"role": "user", "content": "2+2?"}], "ground_truth": "4", "dataset": "gsm8k"}
    (directory / "prompts.jsonl").write_text(json.dumps(row) + "\n")
    return directory


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ({"path": "rm"}, None),
        (
            {"path": "other"},
            "value.path = {}/other has a vocabulary of 1000, the policy one of 264; expected a reward model of the",
        ),
        (
            {"path": "rm", "parallel": {"tensor": 2}},
            "value.parallel: tensor 2 x pipeline 1 x context 1 = 2 processes a replica do",
        ),
        ({"path": "rm", "parallel": {"tensor": 1}}, None),
        ({"path": "shifted"}, "value.path = {0}/shifted has another tokenizer than the policy: 'b' is token "),
        ({"path": "bare"}, None),
        (
            {"path": "short"},
            "value.path = {}/short was made for 79 tokens, but data.max_prompt = 64 and sampling.max_tokens = 16 make 80; lower",
        ),
        ({"path": "nowhere"}, "value.path = '{}/nowhere': no such directory"),
        ({"path": "model"}, "value.path = {}/model: a language model; expected what tulu-mega rm makes; set value.new_head"),
        ({"path": "model", "new_head": True}, None),
    ],
)
def test_value_models(place, tmp_path, value, says):
    looked_at(place, tmp_path, says, value=value | {"path": str(place / value["path"])})


def test_a_reward_model_beside_for_shorter_texts(place, tmp_path):
    value, rewards = {"path": str(place / "rm")}, {"model": str(place / "short")}
    looked_at(place, tmp_path, "rewards.model = {}/short was made for 79 tokens, but", value=value, rewards=rewards)


def test_prompts_that_are_too_long(place, tmp_path):
    """For what they may have, and for the models."""
    data = {"train": str(place / "prompts.jsonl"), "max_prompt": 4}
    says = "data.train: none of the 1 rows can be used"
    looked_at(place, tmp_path, says, data=data, value={"path": str(place / "rm")})
    longest = json.loads((place / "model/config.json").read_text())["max_position_embeddings"]
    says = f"data.max_prompt = 64 and sampling.max_tokens = {longest} make {longest + 64} tokens, but the model was made for"
    looked_at(place, tmp_path, says, sampling={"max_tokens": longest}, value={"path": str(place / "rm")})


def looked_at(place, tmp_path, says: str | None, **sections) -> None:
    """What `check` says of a run with these sections."""
    settings = {
        "model": {"path": str(place / "model"), "dtype": "fp32"}, "run_dir": str(tmp_path / "run"),
        "data": {"train": str(place / "prompts.jsonl"), "max_prompt": 64}, "sampling": {"max_tokens": 16},
    } | sections  # fmt: skip
    found = check(PpoSettings.model_validate(settings))
    if says is None:
        assert found == []
    else:
        told = [problem for problem in found if problem.startswith(says.format(place))]
        assert told and all("\n" not in problem for problem in told), found


@pytest.mark.parametrize(
    ("parallel", "value", "says"),
    [
        ({"tensor": 2, "data": 2}, {"tensor": 2, "pipeline": 2}, None),
        ({"tensor": 2, "data": 2}, {"pipeline": 2, "virtual_pipeline": 2}, "value.path = {}/rm: the model's num_hidden_layers"),
        (
            {"tensor": 3, "data": 1},
            {"tensor": 3},
            "value.path = {}/rm: value.parallel.tensor = 3 does not divide the model's num_att",
        ),
        (
            {"pipeline": 3},
            None,
            "value.path = {}/rm: the model's num_hidden_layers = 2 cannot be split over parallel.pipeline = 3",
        ),
    ],
)
def test_layouts(place, tmp_path, parallel, value, says):
    """What does not fit either model is said of it, before anything starts."""
    looked_at(place, tmp_path, says, parallel=parallel, value={"path": str(place / "rm"), "parallel": value})


def test_a_layout_for_neither_model(place, tmp_path):
    """Both are said, at once."""
    parallel, value = {"tensor": 3, "data": 2}, {"path": str(place / "rm"), "parallel": {"pipeline": 3, "data": 2}}
    for says in (
        "parallel.tensor = 3 does not divide the model's num_attention_heads",
        "value.path = {}/rm: the model's num_hidden_layers = 2 cannot be split over value.parallel.pipeline = 3",
    ):
        looked_at(place, tmp_path, says, parallel=parallel, value=value)


@pytest.mark.parametrize(
    ("parallel", "value", "model", "says"),
    [
        ({"tensor": 2, "data": 2}, {"tensor": 3}, {}, r"value\.parallel: tensor 3 .* do not divide the world of 4"),
        ({"tensor": 2, "data": 2}, {"tensor": 2, "data": 4}, {}, r"value\.parallel: .* x data 4 = 8 processes, but"),
        (
            {"tensor": 4},
            {"tensor": 2, "data": 3},
            {},
            r"value\.parallel: 6 processes, but the policy's layout takes multiples of 4",
        ),
        ({}, {"virtual_pipeline": 2}, {}, "virtual_pipeline = 2 needs pipeline"),
        ({}, {"grad_dtype": "bf16"}, {"dtype": "fp32"}, r"value\.parallel, looked at as parallel: .*needs model\.dtype = 'bf16'"),
        ({"data": 2}, {"overlap_param_gather": True}, {}, "overlap_param_gather needs distributed_optimizer"),
    ],
)
def test_layouts_that_no_model_has(parallel, value, model, says):
    given = {"model": {"path": "m"} | model, "run_dir": "r", "data": {"train": "d"}, "parallel": parallel}
    with pytest.raises(ValueError, match=says):
        PpoSettings.model_validate(given | {"value": {"path": "v", "parallel": value}})


def test_a_value_model_on_another_world_is_refused_under_torchrun(place, tmp_path, monkeypatch):
    settings = {
        "model": {"path": str(place / "model"), "dtype": "fp32"}, "run_dir": str(tmp_path / "run"),
        "data": {"train": str(place / "prompts.jsonl"), "max_prompt": 64}, "sampling": {"max_tokens": 16},
        "value": {"path": str(place / "rm"), "parallel": {"pipeline": 2}},
    }  # fmt: skip
    monkeypatch.setenv("RANK", "0")
    for size, wrong in (("4", False), ("3", True)):
        monkeypatch.setenv("WORLD_SIZE", size)
        found = check(PpoSettings.model_validate(settings))
        assert any("value.parallel: tensor 1 x pipeline 2 x context 1 = 2 processes" in each for each in found) == wrong, found


def test_prompts_of_one_response_cannot_be_filtered():
    with pytest.raises(ValueError, match=r"have the same reward, but sampling\.samples = 1; turn it off"):
        PpoSettings.model_validate(
            {"model": "m", "run_dir": "r", "data": {"train": "d"}, "value": {"path": "v"}, "train": {"filter_equal": True}}
        )
