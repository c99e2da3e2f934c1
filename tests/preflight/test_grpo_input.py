"""What `tulu-mega grpo` refuses before anything is started, and says how to mend."""

import json

import pytest

from tulu_mega.config import GrpoSettings, load
from tulu_mega.errors import UserError
from tulu_mega.launch.run_dir import CONFIG
from tulu_mega.preflight import policy
from tulu_mega.preflight.check import check
from tulu_mega.preflight.same_run import same_run
from tulu_mega.quickstart import tiny_model
from tulu_mega.rl.prompts import read, write_rejects

ROW = {"messages": [{"role": "user", "content": "2+2?"}], "ground_truth": "4", "dataset": "gsm8k"}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("grpo") / "model"
    tiny_model.make(directory, seed=0)
    return directory


@pytest.fixture
def problems(model, tmp_path):
    def found(rows=(ROW,), **values) -> list[str]:
        file = tmp_path / "prompts.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        data = {"train": str(file), "max_prompt": 64, **values.pop("data", {})}
        given = {
            "model": {"path": str(model), "dtype": "fp32"}, "run_dir": str(tmp_path / "run"), "data": data,
            "sampling": {"samples": 2, "max_tokens": 32}, **values,
        }  # fmt: skip
        return check(GrpoSettings.model_validate(given))

    return found


def test_nothing_wrong(problems, tmp_path):
    assert problems() == []
    assert not (tmp_path / "run").exists()


def test_longer_than_the_model(problems):
    (problem,) = problems(sampling={"samples": 2, "max_tokens": 500})
    assert "max_prompt = 64 and sampling.max_tokens = 500 make 564 tokens, but the model was made for 512" in problem


def test_longer_than_the_servers(problems):
    (problem,) = problems(rollout={"max_model_len": 80})
    assert problem.startswith("rollout.max_model_len = 80: prompt and response may have 96 tokens")


def test_rows_that_cannot_be_judged(problems):
    found = problems([ROW, {**ROW, "dataset": "gsm9k"}, {**ROW, "dataset": "ifeval", "ground_truth": "{}"}])
    assert "prompts.jsonl line 2: unknown verifier 'gsm9k'; did you mean 'gsm8k'?" in found[0]
    assert "prompts.jsonl line 3: ground_truth for 'ifeval'" in found[1]


def test_all_prompts_too_long(problems):
    long = {**ROW, "messages": [{"role": "user", "content": "why " * 100}]}
    (problem,) = problems([long])
    assert "none of the 1 rows can be used" in problem and "raise data.max_prompt" in problem


def test_prompts_of_another_model(model, tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text(json.dumps(ROW), encoding="utf-8")
    prompts = read(GrpoSettings.model_validate({"model": str(model), "run_dir": "r", "data": str(file)}))
    largest = max(prompts.train[0].ids)
    policy.answerable(prompts, {"vocab_size": largest + 1})
    with pytest.raises(UserError, match=f"data.train holds token {largest}, but the model's vocabulary has {largest} entries"):
        policy.answerable(prompts, {"vocab_size": largest})
    with pytest.raises(UserError, match=r"data\.tokenizer, as the end of a response, holds token 0"):
        policy.answerable(prompts, {"vocab_size": 0})


def test_no_such_file(problems):
    (problem,) = problems(heldout={"data": "nowhere.jsonl"})
    assert problem == "nowhere.jsonl: no such file; correct heldout.data"


def test_a_verifier_of_ones_own_that_is_not_there(problems):
    (problem,) = problems(rewards={"custom": {"mine": "no_such_module:judge"}})
    assert "no_such_module" in problem


def test_a_language_model_is_no_reward_model(problems, model):
    (problem,) = problems(rewards={"model": str(model)})
    assert "a language model; expected what tulu-mega rm makes" in problem


def test_a_trainer_of_servers_elsewhere_needs_no_vllm(problems, monkeypatch):
    def missing(*_) -> None:
        raise UserError("vLLM is not installed")

    monkeypatch.setattr(policy, "check_vllm", missing)
    monkeypatch.setattr(policy, "look", lambda _: ({}, {}))
    assert problems(rollout={"urls": ["http://10.0.0.5:8000"]}) == []
    assert problems() == ["vLLM is not installed"]


def test_a_watchdog_that_would_bite_while_servers_start(problems, monkeypatch):
    monkeypatch.setattr(policy, "look", lambda _: ({}, {}))
    (problem,) = problems(rollout={"start_timeout": 3600.0})
    assert "may wait 7210 s for the servers, but watchdog.timeout = 1800 would end them" in problem
    urls = ["http://10.0.0.5:8000"]
    assert problems(rollout={"start_timeout": 3600.0, "urls": urls}, watchdog={"timeout": 3601.0}) == []
    assert problems(rollout={"start_timeout": 3600.0}, watchdog={"timeout": 0.0}) == []


def test_settings_that_are_refused():
    flags = ["--model", "m", "--run_dir", "r", "--data", "d", "--train.max_policy_lag", "-1", "--sampling.samples", "1"]
    with pytest.raises(UserError) as caught:
        load(GrpoSettings, None, [*flags, "--rollout.urls", '["10.0.0.5:8000"]'])
    told = "\n".join(caught.value.problems)
    assert "max_policy_lag" in told and "sampling.samples" in told and "http://10.0.0.5:8000" in told


def test_a_run_goes_on_with_its_own_settings_only(problems, tmp_path):
    (tmp_path / "run").mkdir()
    before = {"sampling": {"samples": 4}, "policy": {"loss": "gspo"}, "rollout": {"servers": 7}}
    (tmp_path / "run/config.json").write_text(json.dumps(before))
    (problem,) = problems()
    assert "sampling.samples was 4, is 2" in problem and "policy.loss was 'gspo', is 'grpo'" in problem
    assert "servers" not in problem


def test_rejects_are_written(model, tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text(json.dumps(ROW) + "\n{\n", encoding="utf-8")
    settings = GrpoSettings.model_validate(
        {"model": str(model), "run_dir": str(tmp_path / "run"), "data": {"train": str(file), "malformed": "reject"}}
    )
    prompts = read(settings)
    write_rejects(prompts)
    assert prompts.verifiers == ["gsm8k"] and len(prompts.train) == 1
    (reject,) = map(json.loads, prompts.rejects.read_text().splitlines())
    assert reject["kind"] == "malformed" and reject["where"].endswith("line 2")


def test_tests_that_need_objects_of_classes_are_told(model, tmp_path):
    tests = {"Stack": "s = Stack()\nassert s.pop() == 1", "f": "from collections import Counter\nassert f(1) == Counter()"}
    file = tmp_path / "prompts.jsonl"
    rows = [{**ROW, "dataset": "python_code", "ground_truth": [test]} for test in tests.values()]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    given = {"model": str(model), "run_dir": "r", "data": {"train": str(file), "template": "tulu"}}
    (line,) = [line for line in read(GrpoSettings.model_validate(given)).told if "objects" in line]
    assert line.startswith("data.train: tests of 1 rows make objects of the program's classes (Stack in ")
    assert "prompts.jsonl line 1), which are not served" in line
    served = GrpoSettings.model_validate({**given, "rewards": {"code_objects": True}})
    assert not [line for line in read(served).told if "objects" in line]


def test_a_run_that_began_before_verifiers_could_be_strict_goes_on(model, tmp_path):
    settings = GrpoSettings.model_validate({"model": str(model), "run_dir": str(tmp_path), "data": "d.jsonl"})
    before = json.loads(settings.model_dump_json())
    del before["rewards"]["math_accepts"], before["rewards"]["code_objects"]
    (tmp_path / CONFIG).write_text(json.dumps(before))
    same_run(settings)
    before["rewards"]["math_accepts"] = ["several"]
    (tmp_path / CONFIG).write_text(json.dumps(before))
    with pytest.raises(UserError, match=r"rewards\.math_accepts was"):
        same_run(settings)
