"""What `check` says of a value model that will not do."""

from __future__ import annotations

import json

import pytest

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
    row = {"messages": [{"role": "user", "content": "2+2?"}], "ground_truth": "4", "dataset": "gsm8k"}
    (directory / "prompts.jsonl").write_text(json.dumps(row) + "\n")
    return directory


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ({"path": "rm"}, None),
        ({"path": "nowhere"}, "value.path = '{}/nowhere': no such directory"),
        ({"path": "model"}, "value.path = {}/model: a language model; expected what tulu-mega rm makes; set value.new_head"),
        ({"path": "model", "new_head": True}, None),
    ],
)
def test_value_models(place, tmp_path, value, says):
    settings = {
        "model": {"path": str(place / "model"), "dtype": "fp32"}, "run_dir": str(tmp_path / "run"),
        "data": {"train": str(place / "prompts.jsonl"), "max_prompt": 64}, "sampling": {"max_tokens": 16},
        "value": value | {"path": str(place / value["path"])},
    }  # fmt: skip
    found = check(PpoSettings.model_validate(settings))
    if says is None:
        assert found == []
    else:
        assert any(problem.startswith(says.format(place)) for problem in found), found


def test_prompts_of_one_response_cannot_be_filtered():
    with pytest.raises(ValueError, match=r"have the same reward, but sampling\.samples = 1; turn it off"):
        PpoSettings.model_validate(
            {"model": "m", "run_dir": "r", "data": {"train": "d"}, "value": {"path": "v"}, "train": {"filter_equal": True}}
        )
