"""The plan and the dry run of runs that train low-rank adapters, against what true ranks hold and PEFT counts."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest

from tests.lib import dry_jobs, jobs, lora_jobs, quantized_jobs, world
from tests.lib.layouts import size
from tests.plan.test_dry_run import config_of, forked, settings
from tulu_mega import cli
from tulu_mega.bridge.adapters import adapter_family
from tulu_mega.bridge.families import family_for
from tulu_mega.config import ParallelSettings
from tulu_mega.config.lora import LoraSettings
from tulu_mega.config.recompute import recomputed
from tulu_mega.errors import UserError
from tulu_mega.layout.hardware import GPUS
from tulu_mega.plan.dry_run import check
from tulu_mega.plan.model.calibration import RATES
from tulu_mega.plan.model.job import Job, Pack
from tulu_mega.plan.model.kept import layer_kept
from tulu_mega.plan.model.memory import memory_by_rank
from tulu_mega.plan.model.storage import storage
from tulu_mega.plan.model.timing import train_step

pytestmark = pytest.mark.ranks

ARCHITECTURES = Path(__file__).parents[2] / "examples/architectures"
PART = {"rank": 3, "targets": r".*layers\.[02]\..*_proj", "rank_pattern": {"k_proj": 5}}


def job(model: str, parallel: ParallelSettings, **options) -> Job:
    pack = Pack(4096, (512,) * 8, 2048)
    return Job(config_of(ARCHITECTURES / model), parallel, GPUS["h100"], ((pack,) * 8,), **options)


@pytest.mark.parametrize(
    ("layout", "dtype", "format", "lora"),
    [
        ({"tensor": 2, "pipeline": 2}, "fp32", "reshardable", PART),
        ({"pipeline": 2, "virtual_pipeline": 2, "data": 2}, "bf16", "same_layout", {"targets": ["q_proj", "down_proj"]}),
    ],
    ids=str,
)
def test_the_dry_run_says_what_a_true_rank_holds_and_writes(tmp_path, layout, dtype, format, lora):
    jobs.make_model(str(tmp_path / "model"), tied=False)
    asked = settings("sft", layout, model={"path": "m", "dtype": dtype}, checkpoint={"format": format}, lora=lora)
    found = forked(tmp_path / "dry", asked, config_of(tmp_path / "model"), size(layout))
    assert found.problems == ()
    arguments = (str(tmp_path / "model"), layout, dtype, format, str(tmp_path / "checkpoints"), LoraSettings(**lora))
    real = world.run(size(layout), dry_jobs.real, *arguments)
    planned = Job(config_of(tmp_path / "model"), asked.parallel, GPUS["h100"], (), lora=asked.lora)
    for report in found.ranks:
        true, training = real[report.rank], report.training
        for kind in ("shards", "adapters"):
            assert [(shard.name, shard.shape, shard.cut) for shard in getattr(report, kind)] == true[kind]
        assert report.parameter_bytes == true["bytes"]
        assert (training.gradient_buffer, training.main) == (true["gradients"], true["main"])
        assert training.optimizer_bytes == true["moments"] + (4 * true["main"] if dtype == "bf16" else 0)
        assert report.weights_saved + report.optimizer_saved == true["written"]
        assert report.trained == planned.trained[report.stage] > 0
        assert report.parameters == planned.held[report.stage].total


def test_a_policys_reference_is_a_copy_of_its_adapters_and_a_reward_models_head_trains(tmp_path):
    jobs.make_model(str(tmp_path / "model"), tied=False)
    config = config_of(tmp_path / "model")
    policy, reward = (
        forked(tmp_path / stage, settings(stage, {"tensor": 2}, lora={"rank": 4}), config, 2) for stage in ("grpo", "rm")
    )
    assert policy.problems == reward.problems == ()
    assert all(report.beside == 2 * sum(shard.nbytes for shard in report.adapters) > 0 for report in policy.ranks)
    assert all("output_layer.weight" in {shard.name for shard in report.adapters} for report in reward.ranks)
    value = forked(tmp_path / "ppo", settings("ppo", {}, lora={"rank": 4}, value={"path": "v"}), config, 1, config)
    assert value.problems == () and value.ranks[0].adapters and not value.value.ranks[0].adapters  # which trains whole


def test_faults_of_adapters_are_found_and_named(tmp_path):
    jobs.make_model(str(tmp_path / "model"), tied=False)
    asked = settings("sft", {"tensor": 2}, lora={"rank": 4})
    found = forked(tmp_path / "dry", asked, config_of(tmp_path / "model"), 2)
    told = json.loads((tmp_path / "dry/result.json").read_text())
    shapes = {name: tuple(shape) for name, shape in told["hf_shapes"].items()}
    family, config = family_for(told["config"]), told["config"]

    def problems(**changes) -> list[str]:
        """Of the reports with a query's adapter changed, or left out."""
        name = "adapters.model.layers.2.self_attn.q_proj.lora_B"
        ranks = [
            dataclasses.replace(
                report,
                adapters=tuple(
                    dataclasses.replace(shard, **changes) if shard.name == name else shard
                    for shard in report.adapters
                    if changes or shard.name != name
                ),
            )
            for report in found.ranks
        ]
        return check.problems(found.layout, ranks, (), family, config, shapes, asked.parallel, asked.lora)

    assert problems(cut=True) == []
    for told, message in (
        (problems(), "q_proj.lora_B.weight: [0:64, 0:4] of [64, 4] is held by no rank"),
        (problems(cut=False), "q_proj.lora_B: the table cuts it over tensor ranks, megatron-core takes it for the same"),
        (problems(shape=(32, 3)), "q_proj.lora_B is [32, 3] as built, [32, 4] as planned"),
    ):
        assert any(message in each for each in told), told


def test_elements_and_bytes_of_llama_8b():
    """41.9 million elements of rank 16 beside all matrices; nothing else has gradients, moments or a place in a checkpoint."""
    lora = LoraSettings(rank=16)
    whole = job("llama3.1_8b", ParallelSettings(), lora=lora)
    assert whole.trained == (41_943_040,)
    family = adapter_family(family_for(whole.config), lora, whole.config)
    assert sum(map(math.prod, family.hf_shapes(whole.config).values())) == 41_943_040
    rank, bare = memory_by_rank(whole)[0], memory_by_rank(dataclasses.replace(whole, lora=None))[0]
    assert rank.weights == bare.weights + 2 * 41_943_040
    assert (rank.gradients, rank.optimizer) == (4 * 41_943_040, 12 * 41_943_040)
    assert storage(whole, 20e9, False).size == 14 * 41_943_040
    cut = job("llama3.1_8b", ParallelSettings(tensor=2, pipeline=2), lora=lora)
    # A of q, k, v, gate and up, and B of o and down are copied; the others are cut
    copied = 16 * 32 * (5 * 4096 + 2 * 4096)
    assert 2 * sum(cut.trained) == 41_943_040 + copied


def test_llama_405b_lies_on_two_nodes_in_bf16():
    cut = job("llama3.1_405b", ParallelSettings(tensor=8, pipeline=2), lora=LoraSettings())
    assert memory_by_rank(cut)[0].weights == pytest.approx(50.9e9, rel=0.01)


def test_four_bits_a_weight_lie_on_one_node():
    """4.127 bits of each of the layers' matrices with their scales quantized, 4.5 without; 70B and 405B on 8 H100."""
    for model, parallel in (("llama3.1_70b", ParallelSettings(tensor=2)), ("llama3.1_405b", ParallelSettings(tensor=8))):
        plain = job(model, parallel, lora=LoraSettings(), recompute=recomputed("full", None))
        for double, bits in ((True, 4.127), (False, 4.5)):
            lora = LoraSettings(base_precision="nf4", double_quantization=double)
            rank, before = (memory_by_rank(each)[0] for each in (dataclasses.replace(plain, lora=lora), plain))
            layers = plain.held[0].layers
            assert 8 * (rank.weights - before.weights + 2 * layers) / layers == pytest.approx(bits, abs=1e-3)
            assert rank.total < 0.95 * plain.gpu.memory < before.total
            assert rank.working > before.working  # the matrix that is made whole


def test_the_dry_run_counts_blocks_to_the_byte(tmp_path):
    quantized_jobs.make_model(str(tmp_path / "model"))
    layout, lora = {"tensor": 2, "pipeline": 2}, {"base_precision": "nf4", "rank": 3}
    asked = settings("sft", layout, model={"path": "m", "dtype": "bf16"}, lora=lora)
    found = forked(tmp_path / "dry", asked, config_of(tmp_path / "model"), 4)
    assert found.problems == ()
    held = world.run(4, quantized_jobs.held, str(tmp_path / "model"), layout, LoraSettings(**lora))
    assert [report.parameter_bytes for report in found.ranks] == held
    uneven = settings("sft", {"tensor": 4}, lora=lora)
    with pytest.raises(UserError, match="o_proj has 128 columns over 4 tensor ranks, expected whole blocks of 64 on each"):
        forked(tmp_path / "uneven", uneven, config_of(tmp_path / "model"), 4)


def test_frozen_weights_have_one_product_backward():
    whole = job("llama3.1_8b", ParallelSettings(tensor=2))
    thin = dataclasses.replace(whole, lora=LoraSettings(rank=1, targets=["q_proj"]))
    ours, theirs = train_step(thin, RATES), train_step(whole, RATES)
    assert ours.products == pytest.approx(theirs.products * 2 / 3, rel=0.03)
    assert ours.tensor == pytest.approx(theirs.tensor * 8 / 10, rel=1e-3)  # nothing is gathered for their gradients
    assert ours.optimizer < 0.01 * theirs.optimizer
    assert train_step(dataclasses.replace(whole, lora=LoraSettings(rank=64)), RATES).seconds > ours.seconds


@pytest.mark.parametrize("layout", [{}, {"tensor": 2}], ids=str)
def test_adapters_keep_their_narrow_products(tmp_path, layout):
    """Beside what the frozen layers keep for what is before them: by autograd's own account, of every token and layer."""
    jobs.make_model(str(tmp_path), tied=False)
    lora = LoraSettings(rank=5)
    kept = [each["narrow"] for each in world.run(size(layout), lora_jobs.kept_narrow, str(tmp_path), layout, lora)]
    asked = Job(config_of(tmp_path), ParallelSettings(**layout), GPUS["h100"], (), dtype="fp32", lora=lora)
    (planned,) = (each.bytes for each in layer_kept(asked) if each.what == "adapters' narrow products")
    layers = asked.config["num_hidden_layers"]
    assert kept == [lora_jobs.TOKENS * layers * planned] * size(layout)


def test_the_command_plans_them(tmp_path, capsys):
    file = tmp_path / "sft.toml"
    file.write_text('model = "m"\nrun_dir = "r"\ndata = { train = "d" }\nlora = { rank = 8 }\n')
    flags = ["--gpus", "8", "--model", str(ARCHITECTURES / "llama3.1_8b"), "--explain", "--rows", "10000"]
    assert cli.main(["plan", str(file), *flags]) == 0
    said = capsys.readouterr().out
    for told in ("bytes x P of adapters", "adapters' narrow products", "adapters' inputs and results"):
        assert told in said, told
    assert cli.main(["plan", str(file), *flags, "--gpus", "2", "--search", "--lora.rank", "64", "--format", "json"]) == 0
    best = json.loads(capsys.readouterr().out)[0]
    assert best["fits"] and best["layout"]["tensor"] == 1  # whose weights, gradients and moments would take two GPUs
    assert cli.main(["plan", str(file), *flags, "--lora.targets", '["layers.40.mlp.up_proj"]']) == 2
    assert "'layers.40.mlp.up_proj' fits no matrix of the model" in capsys.readouterr().err
