"""`tulu-mega plan` of a reward model beside the one that trains, and of what such a model need not fit."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tests.plan.test_command import MODEL, RECIPES, ROOT, of_ppo
from tulu_mega import cli
from tulu_mega.bridge.families import family_for
from tulu_mega.bridge.families.reward import reward_fields
from tulu_mega.errors import UserError
from tulu_mega.plan.model.calibration import RATES
from tulu_mega.plan.model.timing import score_seconds
from tulu_mega.plan.outlook import divisions, outlook
from tulu_mega.plan.run import ask


def test_a_reward_model_beside_is_planned_as_itself(capsys):
    """It lies in the policy's layout, with its own weights, and scores all responses once; nobody serves it."""
    large, small = (str(ROOT / f"examples/architectures/llama3.1_{size}") for size in ("70b", "8b"))
    alone = outlook(ask(of_ppo("70b")), sampled=1)
    found = outlook(ask(of_ppo("70b", rewards={"model": small})), sampled=1)
    content = json.loads((Path(small) / "config.json").read_text())
    job = replace(found.job, config=content | reward_fields(family_for(content), content))
    parameters = sum(rank.rewards for rank in found.memory) / 2 * found.job.parallel.tensor
    assert parameters == pytest.approx(7_504_932_864, rel=1e-3)  # Llama 3.1 8B without its head; norms are on every rank
    for rank, other in zip(found.memory, alone.memory, strict=True):
        assert rank.rewards == 2 * job.held[rank.rank].total and rank.total == pytest.approx(other.total + rank.rewards)
    assert found.seconds == pytest.approx(alone.seconds + score_seconds(job, RATES), rel=1e-6)
    largest = outlook(ask(of_ppo("8b", rewards={"model": large})), sampled=1)
    assert "rewards" in largest.problems[0]
    with pytest.raises(UserError, match=r"rewards\.model = 'nowhere': no such directory; .*--rewards\.model DIR"):
        ask(of_ppo(rewards={"model": "nowhere"}))
    flags = ["plan", str(RECIPES / "grpo.toml"), "--model", MODEL, "--rewards.model", small]
    assert cli.main([*flags, "--format", "json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["seconds"]["rewards"] > 0 and told["memory"]["ranks"][0]["rewards"] > 2**30
    assert cli.main(flags) == 0
    assert "reward model" in capsys.readouterr().out


def test_what_no_server_has_need_not_fit_servers(tmp_path):
    content = json.loads((Path(MODEL) / "config.json").read_text())
    content |= {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 128}
    (tmp_path / "config.json").write_text(json.dumps(content))
    beside = {"value": {"path": str(tmp_path)}, "rewards": {"model": str(tmp_path)}}
    asked = of_ppo().model_copy(update={**beside, "rollout": {"tensor": 8, "urls": []}, "parallel": {"tensor": 4}})
    assert divisions(ask(asked)) == []
    three = content | {"num_hidden_layers": 3}
    (tmp_path / "config.json").write_text(json.dumps(three))
    wrong = divisions(ask(of_ppo("70b").model_copy(update=beside)))
    assert {problem.split(":")[0] for problem in wrong} == {"value model", "reward model"}
