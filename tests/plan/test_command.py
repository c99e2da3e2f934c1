"""`tulu-mega plan`: what it reads, what it says, what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tulu_mega import cli
from tulu_mega.bridge.families import family_for
from tulu_mega.bridge.families.reward import reward_fields
from tulu_mega.config.recompute import Recomputed
from tulu_mega.errors import UserError
from tulu_mega.layout.division import server_problems
from tulu_mega.plan.model import memory
from tulu_mega.plan.model.calibration import RATES
from tulu_mega.plan.model.memory import memory_by_rank
from tulu_mega.plan.model.storage import storage
from tulu_mega.plan.model.timing import score_seconds, train_step
from tulu_mega.plan.outlook import outlook
from tulu_mega.plan.run import ask
from tulu_mega.plan.search import layouts, search
from tulu_mega.plan.settings import PlanSettings
from tulu_mega.plan.source import read_architecture, read_stage
from tulu_mega.plan.table import _duration, _size

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "examples/tulu3/8b"
MODEL = str(ROOT / "examples/architectures/llama3.1_8b")


def asked(stage: str, **values) -> PlanSettings:
    return PlanSettings(config=[str(RECIPES / f"{stage}.toml")], **{"model": MODEL, "gpus": 8, **values})


def of_ppo(size: str = "8b", **values) -> PlanSettings:
    """A recipe of PPO, whose value model is of 8B."""
    model = str(ROOT / f"examples/architectures/llama3.1_{size}")
    return PlanSettings(config=[str(RECIPES.parent / size / "ppo.toml")], model=model, value={"path": MODEL}, **values)


def test_a_value_model_is_planned_as_a_reward_model_in_training(tmp_path):
    """What it holds, its passes and its updates are those of `rm` on the same sequences; the policy's are those of `grpo`."""
    question = ask(of_ppo())
    found = outlook(question, sampled=1)
    assert found.problems == [] and found.gpus == 10
    work, value = question.workload, found.value
    assert (work.scorings, work.updates, work.value.scorings) == (2, 4, 1)
    content = question.config | reward_fields(family_for(question.config), question.config)
    job = replace(found.job, config=content)
    assert memory_by_rank(job) == value.memory
    alone = train_step(job, RATES)
    assert value.step.seconds == pytest.approx(4 * alone.seconds) and value.step.flops == pytest.approx(4 * alone.flops)
    assert value.scoring == pytest.approx(score_seconds(job, RATES))
    assert found.scoring == pytest.approx(2 * score_seconds(found.job, RATES))
    policy = memory_by_rank(found.job, 1, question.servers.bucket)
    assert found.fullest.value == value.memory[0].weights + value.memory[0].gradients + value.memory[0].optimizer
    assert found.fullest.total == pytest.approx(policy[0].total + found.fullest.value + 1.05 * found.fullest.value_passes)
    trained = found.step.seconds + value.seconds + found.scoring
    assert found.seconds == pytest.approx(max(trained, found.generation) + found.sync)  # servers generate beside training
    in_turn = outlook(ask(of_ppo(train={"max_policy_lag": 0})), sampled=1)
    assert in_turn.seconds == pytest.approx(trained + found.generation + found.sync)
    models = [storage(each, 20e9, False) for each in (found.job, job)]
    assert found.storage.size == sum(each.size for each in models) and found.storage.load == sum(each.load for each in models)

    twice = outlook(ask(of_ppo(train={"passes": 2, "mini_batches": 2})), sampled=1)
    assert twice.value.step.tokens == pytest.approx(value.step.tokens / 2, rel=1e-3)
    updates = tmp_path / "ppo.toml"
    updates.write_text((RECIPES / "ppo.toml").read_text().replace("[value]\n", "[value]\nupdates = 3\n"))
    asked = of_ppo().model_copy(update={"config": [str(updates)]})
    assert outlook(ask(asked), sampled=1).value.step.seconds == pytest.approx(3 * value.step.seconds)


def test_a_smaller_value_model_comes_in_the_place_of_the_policys_passes():
    found = outlook(ask(of_ppo("70b")), sampled=1)
    assert found.problems == [] and found.fits
    assert [rank.value_passes for rank in found.memory] == [0.0] * 4
    assert all(rank.value > 3 * 2**30 for rank in found.memory)
    larger = of_ppo("8b").model_copy(update={"value": {"path": str(ROOT / "examples/architectures/llama3.1_70b")}})
    found = outlook(ask(larger), sampled=1)
    assert found.fullest.value_passes > 2**30 and "value" in found.problems[0]


def test_a_layout_of_the_value_models_own():
    """Each of the policy's pipeline ranks has the fullest of the value model's ranks on the same GPUs, and further groups."""
    own = {"tensor": 4, "pipeline": 2, "data": 4}
    asked = of_ppo("70b").model_copy(update={"value": {"path": MODEL, "parallel": own}})
    found = outlook(ask(asked), sampled=1)
    assert found.problems == [] and (found.value.job.data, found.value.job.parallel.pipeline) == (4, 2)
    assert [len(found.value.by_policys_rank(found.job)[rank]) for rank in range(4)] == [1, 1, 1, 1]
    held = [rank.held for rank in found.value.memory]
    assert held[0] != held[1] and [rank.value - memory.GROUPS for rank in found.memory] == [held[0], held[0], held[1], held[1]]
    deep = of_ppo("8b").model_copy(update={"value": {"path": MODEL, "parallel": {"pipeline": 8, "data": 1}}})
    found = outlook(ask(deep), sampled=1)
    assert found.value.by_policys_rank(found.job) == [found.value.memory] and len(found.value.memory) == 8
    wrong = of_ppo("70b").model_copy(update={"value": {"path": MODEL, "parallel": {"pipeline": 33}}})
    with pytest.raises(UserError, match=r"value\.parallel: .* do not divide the world of 32"):
        ask(wrong)


def test_layouts_of_a_policy_and_its_value_model_are_looked_for_together():
    found = search(ask(of_ppo(gpus=4, gpu="b200", train={"prompts": 8})))
    assert found and all(each.fits and each.value.job.parallel == each.job.parallel for each in found)


def test_what_is_wrong_with_a_value_model_is_said(tmp_path):
    with pytest.raises(UserError, match=r"value\.path = 'nowhere': no such directory; .*--value\.path DIR"):
        ask(of_ppo().model_copy(update={"value": {"path": "nowhere"}}))
    content = json.loads((Path(MODEL) / "config.json").read_text()) | {"num_hidden_layers": 3}
    (tmp_path / "config.json").write_text(json.dumps(content))
    question = ask(of_ppo("70b").model_copy(update={"value": {"path": str(tmp_path)}}))
    with pytest.raises(UserError, match="value model: the model's num_hidden_layers = 3 cannot be split"):
        outlook(question)


def test_json_and_tables_have_the_value_model(capsys):
    flags = ["plan", str(RECIPES / "ppo.toml"), "--model", MODEL, "--value.path", MODEL]
    assert cli.main([*flags, "--format", "json", "--explain"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["value"]["parameters"] == 7_504_928_768 and told["value"]["layout"]["tensor"] == 4
    assert told["seconds"]["value"] == pytest.approx(told["value"]["seconds"]["step"])
    parts = {name: seconds for name, seconds in told["seconds"].items() if name not in ("step", "before")}
    assert told["seconds"]["step"] == pytest.approx(sum(parts.values()))
    whole = sum(term["value"] for term in told["explained"]["value"]["memory"])
    assert whole == pytest.approx(told["value"]["memory"][0]["total"], rel=1e-3)
    assert cli.main([*flags, "--explain"]) == 0
    words = " ".join(capsys.readouterr().out.split())
    for each in ("value model: ", "value model's scoring", "memory of the value model's fullest rank"):
        assert each in words


@pytest.mark.parametrize("stage", ["sft", "rm", "dpo", "grpo"])
def test_the_recipes_of_8b_fit_a_node(stage):
    settings = asked(stage)
    assert read_stage(settings)[0] == stage
    found = outlook(ask(settings), sampled=1)
    assert found.fits
    assert not found.problems
    assert found.gpus == 8
    assert (found.generation > 0) == (found.sync > 0) == (found.scoring > 0) == (stage == "grpo")
    assert (found.once > 0) == (stage == "dpo")
    assert found.seconds == pytest.approx(max(found.step.seconds + found.scoring, found.generation) + found.sync)
    assert found.question.steps == {"sft": 14_678, "dpo": 2_121, "grpo": 13_020}.get(stage, found.question.steps)


def test_little_room_is_warned_of():
    (told,) = outlook(ask(asked("grpo", data={"pack_length": 7168})), sampled=1).warnings
    assert "GiB are left of a GPU" in told and "lower data.pack_length" in told
    assert not outlook(ask(asked("grpo")), sampled=1).warnings


def test_json_says_what_the_table_says(capsys):
    words = ["plan", str(RECIPES / "sft.toml"), "--gpus", "8", "--model", f"{MODEL}/config.json"]
    assert cli.main([*words, "--format", "json", "--parallel.pipeline", "2"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["layout"]["pipeline"] == 2
    assert told["layout"]["data"] == 2
    assert told["parameters"] == 8_030_261_248
    for rank in told["memory"]["ranks"]:
        assert rank["total"] == pytest.approx(sum(size for name, size in rank.items() if name not in ("rank", "total")))
    parts = {name: seconds for name, seconds in told["seconds"].items() if name not in ("step", "before")}
    assert told["seconds"]["step"] == pytest.approx(sum(parts.values()))
    assert told["gpu_hours"] == pytest.approx(8 * told["hours"])


@pytest.mark.parametrize(
    ("hours", "told"),
    [
        (0.003, "11 s, 1.4 GPU-minutes"),
        (0.02, "1.2 min, 9.6 GPU-minutes"),
        (0.5, "30.0 min, 4.0 GPU-hours"),
        (300, "300 h, 2,400 GPU-hours"),
    ],
)
def test_a_short_run_is_told_in_minutes(hours, told):
    assert f"{_duration(hours)}, {_duration(8 * hours, 'GPU-')}" == told


@pytest.mark.parametrize(("nbytes", "told"), [(5e6, "4.77 MiB"), (2e8, "191 MiB"), (1.6e9, "1.49 GiB"), (3e12, "2,794 GiB")])
def test_main_memory_is_told_to_three_digits(nbytes, told):
    assert _size(nbytes) == told


def test_weights_kept_in_fp8_are_counted(tmp_path, capsys):
    """A byte and a transposed one in the place of bf16's two; casts of bf16 weights come on top of these."""
    weights = {}
    for name, table in {"off": "", "cast": 'fp8 = "blockwise"', "kept": 'fp8 = "blockwise"\nfp8_param_gather = true'}.items():
        (tmp_path / f"{name}.toml").write_text((RECIPES / "sft.toml").read_text() + f"\n[precision]\n{table}\n")
        words = ["plan", str(tmp_path / f"{name}.toml"), "--stage", "sft", "--gpus", "8", "--model", MODEL, "--format", "json"]
        assert cli.main(words) == 0
        weights[name] = json.loads(capsys.readouterr().out)["memory"]["ranks"][0]["weights"]
    assert weights["kept"] == weights["off"] < weights["cast"] < 2 * weights["off"]


def test_what_does_not_fit_is_an_error(capsys):
    large = MODEL.replace("8b", "405b")
    words = [str(RECIPES / "sft.toml"), "--gpus", "64", "--model", large, "--parallel.tensor", "8", "--parallel.pipeline", "8"]
    assert cli.main(["plan", *words]) == 2
    said = capsys.readouterr()
    assert "left of 79.1" in said.out
    assert "GiB of a GPU's 79.1 GiB, most of it optimizer" in said.err


@pytest.mark.parametrize("columns", ["30", "80"])
def test_no_number_is_cut_where_it_is_narrow(columns, capsys, monkeypatch):
    """A table takes the width that it needs: a terminal goes on in the next line, a pipe has it whole."""
    monkeypatch.setenv("COLUMNS", columns)
    large = MODEL.replace("8b", "405b")
    words = [str(RECIPES.parent / "405b/sft.toml"), "--model", large, "--explain"]
    assert cli.main(["plan", *words]) == 0
    said = capsys.readouterr().out
    assert "…" not in said and "left of 79.1" in said
    assert "gradients and parameters, exposed" in said


def test_a_checkpoints_seconds_are_told():
    """5.7 TB of 405B: 14 bytes a parameter, from 112 GPUs' weights and 224 GPUs' states. Asynchronously training waits for a
    copy to main memory alone."""
    words = dict(model=MODEL.replace("8b", "405b"), gpus=224, config=[str(RECIPES.parent / "405b/sft.toml")])
    found = {}
    for name in (False, True):
        checkpoint = {"asynchronous": name, "format": "same_layout"}
        found[name] = outlook(ask(PlanSettings(**words, checkpoint=checkpoint)), sampled=1).storage
    at_once, behind = found[False], found[True]
    assert at_once.size == pytest.approx(14 * 405.9e9, rel=2e-3)
    assert at_once.waits == at_once.save == behind.save == pytest.approx(at_once.size / 20e9)
    assert behind.waits < 2
    faster = outlook(ask(PlanSettings(**words, storage=40.0)), sampled=1).storage
    assert faster.save == pytest.approx(at_once.save / 2)
    assert at_once.load > at_once.save


def test_servers_that_do_not_fit_take_for_ever(capsys):
    words = [str(RECIPES.parent / "405b/grpo.toml"), "--model", MODEL.replace("8b", "405b"), "--rollout.quantization", "none"]
    assert cli.main(["plan", *words]) == 2
    said = capsys.readouterr()
    assert "for ever" in said.out and "nan" not in said.out and "inf" not in said.out
    assert "while weights arrive a server's GPU holds 32.5 GiB" in said.err


@pytest.mark.parametrize("stage", ["sft", "grpo"])
@pytest.mark.parametrize("gpus", [7, 256, 336])
def test_what_a_hint_offers_is_taken(stage, gpus):
    """Whichever of the numbers is given next is not refused in turn; with a number of replicas in the file and without."""
    large = {"8b": "405b"} if gpus > 50 else {}
    file = str(RECIPES / f"{stage}.toml").replace("8b", large.get("8b", "8b"))
    model = MODEL.replace("8b", large.get("8b", "8b"))
    with pytest.raises(UserError) as refused:
        _ = ask(PlanSettings(config=[file], model=model, gpus=gpus)).trainers
    (said,) = refused.value.problems
    offers = said.split("; give ")[1].split(", or another")[0].split(" or ")
    assert offers
    for offer in offers:
        number, _, data = offer.partition(" with --parallel.data ")
        parallel = {"data": int(data)} if data else {}
        assert ask(PlanSettings(config=[file], model=model, gpus=int(number), parallel=parallel)).trainers > 0


def test_search_ranks_what_fits():
    found = search(ask(asked("sft", gpus=4)))
    assert all(each.fits and each.job.world == 4 for each in found)
    assert [each.seconds for each in found] == sorted(each.seconds for each in found)
    assert len({each.job.parallel for each in found}) == len(found) > 2
    assert all(each.roomy or each.job.recompute.layers is None for each in found)
    recomputed = {each.job.recompute for each in found}
    assert Recomputed() in recomputed and len(recomputed) > 1  # whatever the file says, of each layout what it needs


def test_search_gives_every_replica_a_sequence():
    """128 rows feed 128 replicas; of far more GPUs no layout is looked at for minutes."""
    for gpus, fewest in ((1024, 8), (8 * 4099, 0)):
        tried = list(layouts(ask(asked("sft", gpus=gpus))))
        assert bool(tried) == bool(fewest) and all(each.model_parallel >= fewest for each in tried)
    with pytest.raises(UserError, match=r"with work for all in an update's 128 sequences.*give fewer --gpus"):
        search(ask(asked("sft", gpus=8 * 4099)))


def test_a_switch_needs_no_value(capsys):
    assert cli.main(["plan", str(RECIPES / "sft.toml"), "--gpus", "2", "--gpu", "b200", "--model", MODEL, "--search"]) == 0
    assert "layouts fit" in capsys.readouterr().out


@pytest.mark.parametrize("after", [True, False])
def test_a_table_may_be_given_as_a_value_with_more_of_its_settings_beside(capsys, after):
    """`--model DIR` and `--model.recompute`: as with the commands that train."""
    more = ["--model.recompute", "full"]
    words = ["--model", MODEL, *more] if after else [*more, "--model", MODEL]
    assert cli.main(["plan", str(RECIPES / "sft.toml"), "--gpus", "8", *words]) == 0
    assert "recompute full" in capsys.readouterr().out


def test_the_picture_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    target = tmp_path / "plan.png"
    flags = ["--gpus", "8", "--model", MODEL, "--parallel.pipeline", "4", "--picture", str(target)]
    assert cli.main(["plan", str(RECIPES / "sft.toml"), *flags]) == 0
    assert target.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (dict(gpus=7), r"gpus = 7: parallel.tensor 2 .* = 2 does not divide the 7 that train; give 6 or 8, or another layout"),
        (dict(gpus=1), r"does not divide the 1 that train; give 2, or another layout"),
        (dict(parallel={"tensor": 3}, gpus=3), r"parallel.tensor = 3 does not divide the model's num_attention_heads = 32"),
        (dict(gpu="h1000"), r"gpu = 'h1000' is not known"),
        (dict(rollout_gpu="v100"), r"rollout_gpu = 'v100' is not known"),
        (dict(mean_length=10_000_000), r"mean_length = 10000000 is more than the 4096 tokens at which these are cut"),
        (dict(parallel={"data": 2}), r"data 2 = 4, not the 8 that train; give 4 or 8 with --parallel.data 4, or another"),
        (dict(parallel={"tensorr": 2}), r"parallel.tensorr: unknown setting; did you mean 'tensor'"),
        (dict(model="/nowhere/model"), r"a directory with its config.json is enough"),
    ],
)
def test_mistakes_are_told(values, message):
    with pytest.raises(UserError, match=message):
        outlook(ask(asked("sft", **values)), sampled=1)


def test_a_server_s_parts_are_told_before_it_is_started(capsys):
    """vLLM's own rules; heads of keys are repeated where there are fewer than parts."""
    config = {"num_attention_heads": 24, "num_key_value_heads": 4, "intermediate_size": 96}
    assert [tensor for tensor in range(1, 25) if not server_problems(config, tensor)] == [1, 2, 4, 8, 12, 24]
    assert cli.main(["plan", str(RECIPES / "grpo.toml"), "--model", MODEL, "--rollout.tensor", "3", "--dry_run"]) == 2
    told = capsys.readouterr().err
    assert "rollout.tensor = 3 does not divide the model's num_attention_heads = 32" in told


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"config\.json: no such file"),
        ("{", r"config\.json: cannot be read as JSON"),
        ("[]", r"holds list, expected a JSON object"),
        ('{"architectures": ["GPT2LMHeadModel"]}', r"'GPT2LMHeadModel'\] is not supported"),
        ('{"architectures": ["LlamaForCausalLM"], "hidden_size": 64}', r"vocab_size = None, expected a whole number"),
    ],
)
def test_an_architecture_that_cannot_be_read(tmp_path, content, message):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match=message):
        ask(asked("sft", model=str(tmp_path)))


@pytest.mark.parametrize("reward", [False, True])
@pytest.mark.parametrize("name", ["llama3.1_8b", "olmo2_7b"])
def test_the_defaults_of_transformers_change_no_plan(name, reward):
    """config.json is read as it stands; what transformers would fill in is not what plans are made of."""
    from transformers import AutoConfig

    directory, question = str(ROOT / "examples/architectures" / name), ask(asked("sft"))
    model = question.settings.model.model_copy(update={"path": directory})
    filled = AutoConfig.from_pretrained(directory).to_dict()
    filled |= reward_fields(family_for(filled), filled) if reward else {}
    found, wanted = (outlook(replace(question, config=each), 1) for each in (read_architecture(model, reward), filled))
    assert (found.step, found.memory, found.host) == (wanted.step, wanted.memory, wanted.host)


def test_a_plan_imports_neither_torch_nor_transformers():
    """They take seconds; a plan takes one."""
    words = ["plan", str(RECIPES / "sft.toml"), "--gpus", "8", "--model", MODEL]
    code = f"import sys; from tulu_mega import cli; print(cli.main({words}), sorted(sys.modules.keys() & set(sys.argv)))"
    done = subprocess.run([sys.executable, "-c", code, "torch", "transformers"], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "0 []"


def test_a_file_for_no_certain_command_is_asked_about(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text('run_dir = "x"\n[data]\ntrain = "a"\n')
    with pytest.raises(UserError, match="add --stage sft, --stage rm"):
        read_stage(PlanSettings(config=[str(file)]))
    assert read_stage(PlanSettings(config=[str(file)], stage="rm", model=MODEL))[0] == "rm"
