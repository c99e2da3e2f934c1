"""The dry run: its ranks make up the model, what it says of a rank is what a true one holds and writes, faults are found."""

from __future__ import annotations

import json
import re
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.lib import dry_jobs, jobs, world
from tests.lib.families import FAMILIES, make_model
from tests.lib.layouts import size
from tulu_mega.bridge.box import Box
from tulu_mega.bridge.families import family_for
from tulu_mega.cli import main
from tulu_mega.config import DpoSettings, GrpoSettings, PpoSettings, RmSettings, ScoreSettings, SftSettings, load
from tulu_mega.errors import UserError
from tulu_mega.plan.dry_run import check
from tulu_mega.plan.dry_run.cover import uncovered
from tulu_mega.plan.dry_run.run import answer, ask, dry_run
from tulu_mega.plan.dry_run.show import summary, tell

pytestmark = pytest.mark.ranks

ARCHITECTURES = Path(__file__).parents[2] / "examples/architectures"
STAGES = {"sft": SftSettings, "rm": RmSettings, "dpo": DpoSettings, "grpo": GrpoSettings, "ppo": PpoSettings}
LAYOUTS = {
    "TP2xPP2xCP2xDP2": (16, {"tensor": 2, "pipeline": 2, "context": 2}),
    "PP2xVPP2xDP3": (6, {"pipeline": 2, "virtual_pipeline": 2}),
    "TP4xPP3xDP2": (24, {"tensor": 4, "pipeline": 3}),
    "PP2 uneven": (2, {"pipeline": 2, "first_stage_layers": 1}),
    "DP5": (5, {}),
}


def settings(stage: str, layout: dict, **more):
    if stage == "score":
        return ScoreSettings.model_validate({"model": "m", "input": "i", "output": "o", "parallel": layout})
    named = {"model": "m", "run_dir": "r", "data": {"train": "d"}, "parallel": layout} | more
    return STAGES[stage].model_validate(named)


def config_of(model: Path) -> dict:
    return json.loads((model / "config.json").read_text())


def forked(directory: Path, asked, config: dict, ranks: int, value: dict | None = None):
    """`dry_run` in a fork of a process that has the libraries, which takes a second instead of ten."""
    began = time.monotonic()
    directory.mkdir(parents=True, exist_ok=True)
    ask(directory, asked, config, ranks, value)
    world.run(1, dry_jobs.dry, str(directory))
    return answer(directory, asked, began)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """config.json of a small model of every family, and of a Llama, tied or not."""
    made = {}
    for name in FAMILIES:
        directory = tmp_path_factory.mktemp("model")
        make_model(str(directory), name)
        made[name] = config_of(directory)
    for name, tied in (("Llama", False), ("Llama tied", True)):
        directory = tmp_path_factory.mktemp("model")
        jobs.make_model(str(directory), tied)
        made[name] = config_of(directory)
    return made


CASES = [  # every family, stage and layout
    ("Llama", "sft", "TP2xPP2xCP2xDP2"),
    ("Llama tied", "grpo", "TP4xPP3xDP2"),
    ("Llama tied", "rm", "PP2xVPP2xDP3"),
    ("Qwen 2", "dpo", "PP2xVPP2xDP3"),
    ("Qwen 2", "grpo", "DP5"),
    ("Qwen 3", "sft", "TP4xPP3xDP2"),
    ("Mistral", "grpo", "PP2 uneven"),
    ("OLMo 2", "grpo", "TP2xPP2xCP2xDP2"),
    ("OLMo 2", "rm", "TP4xPP3xDP2"),
    ("OLMo 3", "dpo", "TP2xPP2xCP2xDP2"),
    ("OLMo 3", "score", "PP2xVPP2xDP3"),
]


@pytest.mark.parametrize(("family", "stage", "layout"), CASES, ids=str)
def test_the_ranks_make_up_the_model(models, tmp_path, capsys, family, stage, layout):
    ranks, parallel = LAYOUTS[layout]
    found = forked(tmp_path, settings(stage, parallel), models[family], ranks)
    assert found.problems == ()
    place = found.layout
    assert (place.world, len(found.ranks)) == (ranks, place.tensor * place.pipeline)
    assert found.replicas == (place.pipeline if place.copies > 1 else 0)
    for report in found.ranks:
        if stage == "score":
            assert report.training is None and report.sending is None
            continue
        training = report.training
        assert training.gradient_buffer == 4 * training.slice * place.copies >= 4 * report.parameters
        assert sum(training.held_D) == report.parameters
        assert (report.sending is not None) == (stage == "grpo")
        assert report.beside == (report.parameter_bytes if stage == "grpo" else 0)
    if stage == "grpo":
        quantized = forked(tmp_path, settings(stage, parallel, rollout={"quantization": "fp8"}), models[family], ranks)
        assert quantized.problems == ()
        lighter = [sum(report.sending.nbytes for report in each.ranks) for each in (quantized, found)]
        assert 0.5 < lighter[0] / lighter[1] < 0.95
        tensors = [name for report in found.ranks for name in report.sending.tensors]
        assert len(tensors) == len(set(tensors)) == found.hf_tensors
        assert sum(report.sending.nbytes for report in found.ranks) == 2 * found.hf_parameters
    tell(found)
    assert "nothing wrong found" in " ".join(capsys.readouterr().out.split())
    tell(found, "json")
    told = json.loads(capsys.readouterr().out)
    assert told["layout"]["world"] == ranks
    assert [each["parameter_bytes"] for each in told["ranks"]] == [report.parameter_bytes for report in found.ranks]


@pytest.mark.parametrize(
    ("layout", "dtype", "format", "tied"),
    [
        ({"tensor": 2, "pipeline": 2}, "fp32", "reshardable", True),
        ({"pipeline": 2, "virtual_pipeline": 2, "data": 2}, "bf16", "reshardable", False),
        ({"tensor": 2, "data": 2}, "bf16", "same_layout", False),
        ({"context": 2, "data": 2, "distributed_optimizer": False}, "fp32", "reshardable", False),
    ],
    ids=str,
)
def test_it_says_what_a_true_rank_holds_and_writes(tmp_path, layout, dtype, format, tied):
    model = tmp_path / "model"
    jobs.make_model(str(model), tied)
    asked = settings("grpo", layout, model={"path": "m", "dtype": dtype}, checkpoint={"format": format})
    found = forked(tmp_path / "dry", asked, config_of(model), size(layout))
    assert found.problems == ()
    real = world.run(size(layout), dry_jobs.real, str(model), layout, dtype, format, str(tmp_path / "checkpoints"))
    item = 2 if dtype == "bf16" else 4
    for report in found.ranks:
        true, training = real[report.rank], report.training
        assert [(shard.name, shard.shape, shard.cut) for shard in report.shards] == true["shards"]
        assert training.gradient_buffer == true["gradients"]
        assert training.main == true["main"]
        assert training.optimizer_bytes == true["moments"] + (4 * true["main"] if dtype == "bf16" else 0)
        assert report.weights_saved + report.optimizer_saved == true["written"]
        if not report.tensor_rank:
            assert report.sending.tensors == {name: nbytes * item // 4 for name, nbytes in true["sent"].items()}
    firsts = {report.rank for report in found.ranks}
    for rank, true in enumerate(real):  # copies write their own part of the optimizer's state, or nothing
        if rank not in firsts:
            place = (rank // (len(real) // found.layout.pipeline), rank % found.layout.tensor)
            like = next(report for report in found.ranks if (report.stage, report.tensor_rank) == place)
            assert true["written"] == 12 * like.training.saved_D[1]


def test_a_value_model_is_built_beside(models, tmp_path, capsys):
    """Of another family and depth than the policy; it is trained and saved, and sent nowhere."""
    ranks, parallel = 2, {"pipeline": 2}
    asked = settings("ppo", parallel, value={"path": "v", "parallel": {"tensor": 2}})
    found = forked(tmp_path, asked, models["OLMo 2"], ranks, models["Llama"])
    assert found.problems == () and found.value.problems == ()
    assert (found.layout.pipeline, found.layout.tensor, found.value.layout.pipeline, found.value.layout.tensor) == (2, 1, 1, 2)
    alone = forked(tmp_path / "alone", settings("rm", {"tensor": 2}), models["Llama"], ranks)
    assert [replace(report, beside=0, sending=None) for report in found.value.ranks] == list(alone.ranks)
    assert found.value.hf_parameters == alone.hf_parameters
    assert all(report.sending is None and report.beside == 0 for report in found.value.ranks)
    assert all(report.sending and report.beside for report in found.ranks)
    tell(found)
    words = " ".join(capsys.readouterr().out.split())
    assert words.count("nothing wrong found") == 2 and "What a rank holds of the value model" in words
    tell(found, "json")
    told = json.loads(capsys.readouterr().out)
    assert [each["parameters"] for each in told["value"]["ranks"]] == [report.parameters for report in alone.ranks]


@pytest.mark.parametrize("recompute", [["activation", "layernorm"], pytest.param(["mlp"], marks=pytest.mark.acceptance)], ids=str)
def test_layers_in_fp8_need_no_transformer_engine(models, tmp_path, recompute):
    """Whatever is computed again: nothing is computed here."""
    model = {"path": "m", "dtype": "bf16", "recompute": recompute}
    found = forked(tmp_path, settings("sft", {"tensor": 2}, model=model, precision="tensorwise"), models["Llama"], 2)
    plain = forked(tmp_path / "bf16", settings("sft", {"tensor": 2}, model=model), models["Llama"], 2)
    assert found.problems == () and found.ranks == plain.ranks


@pytest.fixture(scope="module")
def built(models, tmp_path_factory):
    """What a process told of an OLMo 2 (its norms of the projections are cut) as `check.problems` takes it."""
    directory = tmp_path_factory.mktemp("built")
    ranks, parallel = LAYOUTS["TP2xPP2xCP2xDP2"]
    asked = settings("grpo", parallel)
    found = forked(directory, asked, models["OLMo 2"], ranks)
    told = json.loads((directory / "result.json").read_text())
    shapes = {name: tuple(shape) for name, shape in told["hf_shapes"].items()}
    last = [check.RankReport.read(each) for each in told["last"]]
    return dict(
        layout=found.layout, first=list(found.ranks), last=last, family=family_for(told["config"]), config=told["config"],
        hf_shapes=shapes, parallel=asked.parallel,
    )  # fmt: skip


def with_rank(built: dict, at: int, **changes) -> dict:
    first = list(built["first"])
    first[at] = replace(first[at], **changes)
    return built | {"first": first}


def without_rule(built: dict, name: str) -> dict:
    family = built["family"]
    left = tuple(rule for rule in family.rules if not any(name in each for each in rule.megatron))
    return built | {"family": replace(family, rules=left)}


def flipped(shards, name: str):
    return tuple(replace(shard, cut=not shard.cut) if name in shard.name else shard for shard in shards)


FAULTS = {
    "a rule dropped": (lambda b: without_rule(b, "linear_fc2"), "mlp.down_proj.weight: transformers' model has it"),
    "a shape": (
        lambda b: b | {"hf_shapes": b["hf_shapes"] | {"model.norm.weight": (65,)}},
        r"model.norm.weight: \[64\] by the table of Olmo2ForCausalLM, \[65\] in transformers' model",
    ),
    "a tensor unknown to the table": (
        lambda b: b | {"hf_shapes": b["hf_shapes"] | {"model.extra": (3,)}},
        r"model.extra: \[0:3\] of \[3\] is held by no rank",
    ),
    "a stage left out": (lambda b: b | {"first": b["first"][:2]}, "expected"),
    "a layer lost": (
        lambda b: with_rank(with_rank(b, 0, shards=b["first"][0].shards[:-1]), 1, shards=b["first"][1].shards[:-1]),
        "held by no rank",
    ),
    "a layer twice": (
        lambda b: with_rank(
            with_rank(b, 0, shards=b["first"][0].shards + b["first"][0].shards[-1:]),
            1,
            shards=b["first"][1].shards + b["first"][1].shards[-1:],
        ),
        "held 2 times",
    ),
    "a mark that is missing": (
        lambda b: with_rank(
            with_rank(b, 0, shards=flipped(b["first"][0].shards, "q_layernorm")),
            1,
            shards=flipped(b["first"][1].shards, "q_layernorm"),
        ),
        "q_layernorm.weight: the table cuts it over tensor ranks, megatron-core takes it for the same on all",
    ),
    "a copy that differs": (
        lambda b: b | {"last": [replace(b["last"][0], shards=b["last"][0].shards[1:])]},
        "holds other parameters than rank",
    ),
    "an optimizer": (
        lambda b: with_rank(b, 0, training=replace(b["first"][0].training, main=7)),
        "rank 0: its optimizer has 7 elements, the buffers give it",
    ),
    "a shard of the optimizer": (
        lambda b: with_rank(b, 2, training=replace(b["first"][2].training, held_D=b["first"][2].training.held_D[:-1])),
        "the optimizers of its 4 copies have",
    ),
    "the checkpoint": (lambda b: with_rank(b, 3, stored=b["first"][3].stored[:-1]), "checkpoint: .* is held by no rank"),
    "a tensor that is not sent": (
        lambda b: with_rank(b, 0, sending=replace(b["first"][0].sending, tensors={})),
        "model.embed_tokens.weight: sent to the rollout engines 0 times, expected once",
    ),
    "another plan": (
        lambda b: with_rank(b, 1, shards=(replace(b["first"][1].shards[0], shape=(8, 64)), *b["first"][1].shards[1:])),
        "rank 1 .*embedding.word_embeddings.weight is .* as built, .* as planned",
    ),
}  # fmt: skip


def test_nothing_is_wrong_without_a_fault(built):
    assert check.problems(**built) == []


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found_and_named(built, fault):
    plant, message = FAULTS[fault]
    told = check.problems(**plant(built))
    assert any(re.search(message, each) for each in told), told


def test_problems_end_the_command(models, tmp_path):
    found = forked(tmp_path, settings("sft", {}), models["Llama"], 1)
    with pytest.raises(UserError, match="one thing"):
        tell(replace(found, problems=("one thing",)))


def test_cover():
    halves = [((0, 2), (0, 3)), ((2, 4), (0, 3))]
    assert uncovered((4, 3), halves) is None
    assert uncovered((4, 3), halves[:1]) == "[2:4, 0:3] of [4, 3] is held by no rank"
    assert uncovered((4, 3), [*halves, ((1, 2), (1, 2))]) == "[1:2, 1:2] of [4, 3] is held 2 times"
    assert uncovered((4, 3), [Box(((0, 5), (0, 3)))]) == "the box [0:5, 0:3] does not lie in the shape [4, 3]"
    assert uncovered((), [()]) is None


def test_what_cannot_be_built_is_told(models, tmp_path):
    with pytest.raises(UserError, match="tensor 3 x pipeline 1 x context 1 = 3 processes a replica do not divide the world of 4"):
        forked(tmp_path / "world", settings("sft", {"tensor": 3}), models["Llama"], 4)
    with pytest.raises(UserError, match="num_hidden_layers = 4 cannot be split"):
        forked(tmp_path / "stages", settings("sft", {"pipeline": 5}), models["Llama"], 5)


def test_the_command_and_that_it_leaves_nothing_behind(models, tmp_path, capsys):
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text(json.dumps(models["Llama"]))
    file = tmp_path / "sft.toml"
    file.write_text(f'model = "{tmp_path}/model"\nrun_dir = "r"\ndata = {{ train = "d" }}\nparallel = {{ tensor = 2 }}\n')
    before = torch.cuda.current_device
    assert main(["plan", str(file), "--gpus", "4", "--dry-run", "--format", "json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["problems"] == [] and told["layout"]["data"] == 2 and len(told["ranks"]) == 2
    assert not dist.is_initialized()
    assert torch.cuda.current_device is before


RECIPES = [
    (file, architecture)
    for folder, architecture in {
        "tulu3/8b": "llama3.1_8b", "tulu3/70b": "llama3.1_70b", "tulu3/405b": "llama3.1_405b",
        "olmo2/7b": "olmo2_7b", "olmo2/13b": "olmo2_13b", "olmo2/32b": "olmo2_32b",
    }.items()
    for file in sorted((ARCHITECTURES.parent / folder).glob("*.toml"))
]  # fmt: skip


@pytest.mark.acceptance
@pytest.mark.parametrize(("file", "architecture"), RECIPES, ids=lambda each: "-".join(Path(each).parts[-3:]))
def test_every_recipe(tmp_path, capsys, file, architecture):
    asked = load(STAGES[file.stem.partition("_")[0]], str(file))
    ranks = asked.parallel.model_parallel * (asked.parallel.data or 4)
    value = config_of(ARCHITECTURES / architecture.replace("70b", "8b").replace("405b", "8b")) if file.stem == "ppo" else None
    found = forked(tmp_path, asked, config_of(ARCHITECTURES / architecture), ranks, value)
    assert found.problems == () and (found.value is not None) == (file.stem == "ppo")
    with capsys.disabled():
        print(f"\n{summary(found)}")


@pytest.mark.acceptance
def test_405b_and_its_value_model(capsys):
    """Of the recipe, on its 224 ranks: both within three minutes and 4 GiB."""
    asked = load(PpoSettings, str(ARCHITECTURES.parent / "tulu3/405b/ppo.toml"))
    found = dry_run(asked, config_of(ARCHITECTURES / "llama3.1_405b"), 224, config_of(ARCHITECTURES / "llama3.1_8b"))
    assert found.problems == () and (len(found.ranks), len(found.value.ranks)) == (112, 16)
    assert found.peak_bytes < 4 * 2**30
    with capsys.disabled():
        print(f"\n{summary(found)}\n{summary(found.value)}")


@pytest.mark.acceptance
@pytest.mark.parametrize(("stage", "parallel"), [("grpo", {}), ("sft", {"virtual_pipeline": 9})], ids=["grpo", "sft VPP9"])
def test_405b_on_1008_ranks(stage, parallel, capsys):
    asked = settings(stage, {"tensor": 8, "pipeline": 14} | parallel)
    found = dry_run(asked, config_of(ARCHITECTURES / "llama3.1_405b"), 1008)
    assert found.problems == () and len(found.ranks) == 112 and found.layout.data == 9
    assert found.hf_parameters == 405_853_388_800
    assert found.peak_bytes < 4 * 2**30
    with capsys.disabled():
        print(f"\n{summary(found)}")
