"""The recipes of examples/: valid, with the published values, and made for their models."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from tests.lib.tokenizers import byte_tokenizer
from tulu_mega.bridge.families import family_for
from tulu_mega.config import DpoSettings, GrpoSettings, PpoSettings, RmSettings, SftSettings, describe, load
from tulu_mega.data.packing import plan_step
from tulu_mega.errors import UserError
from tulu_mega.layout.alignment import Alignment
from tulu_mega.layout.cost import sequence_flops
from tulu_mega.layout.division import layout_problems
from tulu_mega.layout.fp8 import fp8_problems
from tulu_mega.layout.packing_rules import pack_alignment, pipeline_of
from tulu_mega.layout.schedule import simulate
from tulu_mega.pins import directories
from tulu_mega.plan.outlook import outlook
from tulu_mega.plan.run import ask
from tulu_mega.plan.settings import PlanSettings
from tulu_mega.platforms import fp8
from tulu_mega.preflight import check
from tulu_mega.preflight import model as model_checks
from tulu_mega.preflight import policy as policy_checks
from tulu_mega.preflight import run as run_checks

EXAMPLES = Path(__file__).parents[2] / "examples"
STAGES = {"sft": SftSettings, "rm": RmSettings, "dpo": DpoSettings, "grpo": GrpoSettings}
KINDS = {**STAGES, "ppo": PpoSettings}
MODELS = {
    ("tulu3", "8b"): "llama3.1_8b",
    ("tulu3", "70b"): "llama3.1_70b",
    ("tulu3", "405b"): "llama3.1_405b",
    ("olmo2", "7b"): "olmo2_7b",
    ("olmo2", "13b"): "olmo2_13b",
    ("olmo2", "32b"): "olmo2_32b",
}
VALUES = MODELS | {("tulu3", "70b"): "llama3.1_8b", ("tulu3", "405b"): "llama3.1_8b"}
RECIPES = [EXAMPLES / recipe / size / f"{stage}.toml" for recipe, size in MODELS for stage in STAGES]
RECIPES.append(EXAMPLES / "tulu3/405b/sft_fp8.toml")
PPO = [EXAMPLES / f"{each}/ppo.toml" for each in ("tulu3/8b", "tulu3/70b", "tulu3/405b", "olmo2/7b", "olmo2/13b")]
ADAPTERS = [EXAMPLES / f"tulu3/{each}.toml" for each in ("8b/sft_lora", "8b/grpo_lora", "70b/dpo_qlora", "405b/sft_qlora")]
RECIPES += PPO + ADAPTERS
# learning rates, warm-up and batch as published, by size: SFT and DPO of Tulu 3, which all but the OLMo rates share
RATES = {
    "tulu3": {"8b": (5e-6, 5e-7), "70b": (2e-6, 2e-7), "405b": (2e-6, 2e-7)},
    "olmo2": {"7b": (1e-5, 8e-7), "13b": (7.5e-6, 8e-7), "32b": (4e-6, 5e-7)},
}
# Seeds of the commands in open-instruct's docs/tulu3.md and the defaults of the scripts where these name none (dpo_tune.py 42,
# reward_modeling.py 1); None: ours.
SEEDS = {
    ("tulu3", "8b"): {"sft": 123, "dpo": 42, "rm": 1, "grpo": 1, "ppo": 3},
    ("tulu3", "70b"): {"sft": 456, "dpo": 42, "rm": 1, "grpo": 8, "ppo": 8},
    ("tulu3", "405b"): {"sft": None, "dpo": 42, "rm": 1, "grpo": 3, "ppo": 3},
    # docs/archived_dev_scripts/olmo2_1124.sh and scripts/train/olmo2/*.sh
    ("olmo2", "7b"): {"sft": 4, "dpo": None, "rm": 1, "grpo": 1, "ppo": 1},
    ("olmo2", "13b"): {"sft": None, "dpo": 8, "rm": 1, "grpo": 1, "ppo": 52},
    ("olmo2", "32b"): {"sft": 8, "dpo": 1234, "rm": 1, "grpo": 1},
}
# --total_episodes, --penalty_reward_value, trainers x --local_rollout_batch_size (x --number_samples_per_prompt), updates a step
# and --per_device_train_batch_size of the RL commands: docs/tulu3.md (8B: Tulu 3.1's GRPO, else PPO) and
# scripts/train/olmo2/grpo_{7b,13b}.sh, which the 32B follows.
OLMO2_RL = {"episodes": 2_000_000, "penalty": 0.0, "rollouts": 12 * 4 * 16, "updates": 2, "micro": 1, "rate": 5e-7}
RL = {
    ("tulu3", "8b"): {"episodes": 10_000_000, "penalty": 0.0, "rollouts": 12 * 4 * 16, "updates": 2, "micro": 2, "rate": 5e-7},
    ("tulu3", "70b"): {"episodes": 400_000, "penalty": -10.0, "rollouts": 40 * 16, "updates": 4, "micro": 1, "rate": 1e-7},
    ("tulu3", "405b"): {"episodes": 400_000, "penalty": -10.0, "rollouts": 232 * 8, "updates": 4, "micro": 1, "rate": 1e-7},
    ("olmo2", "7b"): OLMO2_RL,
    ("olmo2", "13b"): OLMO2_RL,
    ("olmo2", "32b"): OLMO2_RL,
}
# trainers x --local_rollout_batch_size, --total_episodes over these, --learning_rate, --beta of the PPO commands:
# docs/tulu3.md and, of OLMo 2, docs/archived_dev_scripts/olmo2_1124.sh
PPO_RUNS = {
    ("tulu3", "8b"): (7 * 32, 10_000_000 // (7 * 32), 3e-7, 0.05),
    ("tulu3", "70b"): (40 * 16, 400_000 // (40 * 16), 1e-7, 0.07),
    ("tulu3", "405b"): (232 * 8, 75, 1e-7, 0.05),  # steps: the released model's
    ("olmo2", "7b"): (31 * 8, 200_000 // (31 * 8), 3e-7, 0.05),
    ("olmo2", "13b"): (31 * 8, 200_000 // (31 * 8), 3e-7, 0.1),
}


def stage(file: Path) -> str:
    return file.stem.partition("_")[0]


def architecture(file: Path) -> dict:
    recipe, size = file.parts[-3:-1]
    return json.loads((EXAMPLES / "architectures" / MODELS[recipe, size] / "config.json").read_text())


def named(file: Path) -> str:
    return "-".join(file.parts[-3:]).removesuffix(".toml")


@pytest.mark.parametrize("file", RECIPES, ids=named)
def test_a_recipe_has_the_fast_defaults(file):
    """Messages of replicas go on behind passes, and attention, which keeps nothing large where it is fused, is not recomputed."""
    settings = load(KINDS[stage(file)], str(file))
    parallel = settings.parallel
    assert parallel.data == 1 or (parallel.overlap_grad_reduce and parallel.overlap_param_gather)
    assert "core_attn" not in settings.model.recomputed.modules


@pytest.mark.parametrize("file", RECIPES, ids=named)
def test_a_recipe_fits_its_model(file):
    settings = load(KINDS[stage(file)], str(file))
    config = architecture(file)
    assert layout_problems(config, settings.parallel) == [] and fp8_problems(config, settings) == []
    family_for(config).hf_shapes(config)
    pipeline = pipeline_of(config, settings)
    if count := getattr(settings.train, "micro_batches", None):
        assert count % pipeline.multiple == 0
    longest = settings.longest if stage(file) in ("grpo", "ppo") else settings.data.max_length
    assert longest <= config["max_position_embeddings"]
    align, pack = pack_alignment(settings), settings.data.pack_length or longest
    assert align == Alignment(sequence=1, total=pack_alignment(settings).total) and pack % align.total == 0
    assert settings.run_dir == f"runs/{file.parts[-3]}_{file.parts[-2]}_{file.stem}"


@pytest.mark.parametrize("file", RECIPES, ids=named)
def test_a_recipe_fits_its_gpus(file):
    """On the GPUs its head names: the layout's own, or eight; 405B generates on H200s."""
    recipe, size = file.parts[-3:-1]
    asked = {"config": [str(file)], "model": str(EXAMPLES / "architectures" / MODELS[recipe, size])}
    if (recipe, size) == ("tulu3", "8b") or file in ADAPTERS:
        asked["gpus"] = 8
    if stage(file) == "ppo":
        asked["value"] = {"path": str(EXAMPLES / "architectures" / VALUES[recipe, size])}
    if (recipe, size, stage(file)) == ("tulu3", "8b", "ppo"):
        asked["gpus"] = 10
    if size == "405b" and stage(file) in ("grpo", "ppo"):
        asked["rollout_gpu"] = "h200"
    found = outlook(ask(PlanSettings(**asked)), sampled=1)
    assert found.problems == [] and found.fits
    # what CUDA's allocator reserves and does not use is in the total, as `plan --search` counts it
    assert found.fullest.total < 0.95 * found.job.gpu.memory, "a twentieth has to be left for what the planner does not know"


TURNS = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]
ROWS = {
    "sft": {"messages": TURNS},
    "rm": {"chosen": TURNS, "rejected": [TURNS[0], {"role": "assistant", "content": "5"}]},
    "grpo": {"messages": TURNS[:1], "ground_truth": "4", "dataset": "gsm8k"},
}
ROWS["dpo"], ROWS["ppo"] = ROWS["rm"], ROWS["grpo"]
TEMPLATE = (  # as OLMo 2's
    "{{ bos_token }}{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] }}"
    "{{ eos_token if m['role'] == 'assistant' else '' }}{% if not loop.last %}{{ '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\n<|assistant|>\n' }}{% endif %}"
)


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    """A row of each stage's kind, and a tokenizer, in the place of what is on the hub."""
    directory = tmp_path_factory.mktemp("local")
    for kind, row in ROWS.items():
        (directory / f"{kind}.jsonl").write_text(json.dumps(row) + "\n")
    tokenizer = byte_tokenizer(bos_token="<|end_of_text|>")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(directory / "tokenizer")
    return directory


@pytest.mark.parametrize("file", RECIPES, ids=named)
def test_check_finds_nothing_wrong(file, local, monkeypatch, tmp_path):
    """All that `check` looks at; of what is on the hub the model's config.json is the published one, data and tokenizer ours."""
    config = architecture(file)
    value = json.loads((EXAMPLES / "architectures" / VALUES[file.parts[-3:-1]] / "config.json").read_text())

    def model(settings):
        if problems := layout_problems(config, settings.parallel):
            raise UserError(problems)
        return config

    monkeypatch.setattr(model_checks, "model_config", model)

    def beside(settings):
        if problems := layout_problems(value, settings.parallel):
            raise UserError(problems)
        return value | {"architectures": [value["architectures"][0].replace("ForCausalLM", "ForSequenceClassification")]}

    monkeypatch.setattr(policy_checks, "model_config", beside)
    monkeypatch.setattr(policy_checks, "model_directory", lambda path: local)
    monkeypatch.setattr(policy_checks, "look", lambda rollout: ({}, {}))  # nobody is at the recipes' addresses
    monkeypatch.setattr(run_checks, "model_directory", lambda path: local)  # with no tokenizer of its own
    monkeypatch.setattr(directories, "model_directory", lambda path: local)
    monkeypatch.setattr(fp8, "this_machine", lambda: fp8.Machine((9, 0), (12, 9), (2, 8)))  # what recipes in FP8 are for
    rows = str(local / f"{stage(file)}.jsonl")
    flags = ["--data.train", rows, "--data.tokenizer", str(local / "tokenizer"), "--run_dir", str(tmp_path / "run")]
    flags += ["--heldout.data", rows] if stage(file) == "rm" else []
    flags += ["--data.cache", str(tmp_path / "cache")] if stage(file) not in ("grpo", "ppo") else []
    assert check.check(load(KINDS[stage(file)], str(file), flags)) == []


def drawn(count: int, longest: int) -> list[int]:
    """Lengths as Tulu 3's: median 400, mean 550, 95th percentile 1,800."""
    quantiles = {0: 20, 0.05: 80, 0.25: 220, 0.5: 400, 0.75: 600, 0.9: 1080, 0.95: 1800, 0.99: 3100, 1: 4096}
    at = np.random.RandomState(0).random_sample(count)
    return np.minimum(np.exp(np.interp(at, list(quantiles), np.log(list(quantiles.values())))).astype(int), longest).tolist()


@pytest.mark.parametrize("file", [file for file in RECIPES if stage(file) not in ("grpo", "ppo")], ids=named)
def test_the_batch_keeps_the_stages_at_work(file):
    """Batches of Tulu-like lengths fit into the micro-batches, and the schedule's simulation is as good as the recipe says."""
    settings, config = load(KINDS[stage(file)], str(file)), architecture(file)
    width = 1 if stage(file) == "sft" else 2
    rows, parallel = settings.train.global_batch * width, settings.parallel
    pipeline = pipeline_of(config, settings)
    cost = sequence_flops(config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"], config["vocab_size"])
    lengths = drawn(4 * rows, settings.data.max_length)
    busy = []
    for at in range(0, len(lengths), rows):
        batch = lengths[at : at + rows]
        plan = plan_step(
            batch, parallel.data or 1, settings.data.pack_length or settings.data.max_length, pack_alignment(settings),
            settings.train.micro_batches, cost=cost, multiple=pipeline.multiple, pipeline=pipeline, together=width,
        )  # fmt: skip
        busy.append(simulate([[sum(cost(batch[i]) for i in each) for each in rank] for rank in plan], pipeline).busy)
    assert np.mean(busy) > (0.8 if "70b" in file.parts or "fp8" in file.stem else 0.84)


def test_every_recipe_is_there():
    assert sorted(RECIPES) == sorted([*EXAMPLES.glob("tulu3/**/*.toml"), *EXAMPLES.glob("olmo2/**/*.toml")])


@pytest.mark.parametrize("file", [file for file in RECIPES if file not in ADAPTERS], ids=named)
def test_a_recipe_has_the_published_values(file):
    recipe, size = file.parts[-3:-1]
    settings = load(KINDS[stage(file)], str(file))
    optim = settings.optim
    assert settings.seed == (SEEDS[recipe, size][stage(file)] or settings.seed)
    # reward_modeling.py: its own eps, torch's weight decay; the RL trainers: torch's of both; SFT and DPO: --weight_decay 0.0
    eps, decay = {"rm": (1e-5, 0.01), "grpo": (1e-8, 0.01), "ppo": (1e-8, 0.01)}.get(stage(file), (1e-8, 0.0))
    assert (optim.betas, optim.eps, optim.weight_decay, optim.clip) == ((0.9, 0.999), eps, decay, 1.0)
    match stage(file):
        case "sft":
            batch = 256 if size in ("405b", "32b") else 128
            assert (optim.lr, optim.schedule, optim.warmup) == (RATES[recipe][size][0], "linear", 0.03)
            assert (settings.train.global_batch, settings.train.epochs, settings.train.reduction) == (batch, 2.0, "sum")
            assert settings.data.max_length == 4096
        case "dpo":
            batch = 256 if size == "405b" else 128
            assert (optim.lr, optim.schedule, optim.warmup) == (RATES[recipe][size][1], "linear", 0.1)
            assert (settings.train.global_batch, settings.train.epochs, settings.data.max_length) == (batch, 1.0, 2048)
            assert (settings.preference.loss, settings.preference.beta) == ("dpo_norm", 5.0)
        case "rm":
            assert (optim.schedule, optim.warmup) == ("linear", 0.0)
            assert optim.lr == 3e-6 or size in ("70b", "405b", "32b")  # of which Ai2 trained none
            assert (settings.train.global_batch, settings.train.epochs, settings.data.max_length) == (256, 1.0, 2048)
            assert (settings.data.overlong, settings.heldout.split) == ("reject", "test_prefs")
        case "grpo":
            published, policy, train = RL[recipe, size], settings.policy, settings.train
            assert train.prompts * settings.sampling.samples == published["rollouts"]
            assert train.mini_batches * train.passes == published["updates"]
            steps = 75 if size == "405b" else published["episodes"] // published["rollouts"]  # 75: the released model's
            assert (train.steps, optim.lr) == (steps, published["rate"])
            assert (policy.overlong, policy.overlong_reward) == ("penalise", published["penalty"])
            assert settings.sampling.max_tokens == (1024 if size == "405b" else 2048)
            assert (settings.sampling.temperature, policy.beta, policy.kl, settings.rewards.scale) == (1.0, 0.01, "k3", 10.0)
            # the trainers' code: clip range, all groups, no weights for the sampler's share, means over micro-batches
            assert (policy.loss, policy.clip_low, policy.clip_high, policy.advantages) == ("grpo", 0.2, 0.2, "standardised")
            assert (train.filter_equal, policy.importance) == (False, "none")
            assert policy.aggregation == "sequence" and published["micro"] <= 2
        case "ppo":
            rollouts, steps, rate, beta = PPO_RUNS[recipe, size]
            policy, value, train = settings.policy, settings.value, settings.train
            assert (train.prompts, settings.sampling.samples, train.mini_batches, train.passes) == (rollouts, 1, 1, 4)
            assert (train.steps, optim.lr, optim.schedule) == (steps, rate, "linear")
            assert (optim.warmup, value.lr, value.updates) == (0.1 if size == "70b" else 0.0, None, 1)
            assert (policy.beta, policy.clip_low, policy.clip_high, policy.importance) == (beta, 0.2, 0.2, "none")
            assert (policy.overlong, policy.overlong_reward, settings.rewards.scale) == ("penalise", -10.0, 10.0)
            assert settings.rewards.math_accepts == ["unevaluated", "several"]
            assert (value.coefficient, value.clip, settings.gae.gamma, settings.gae.lam) == (0.1, 0.2, 1.0, 0.95)
            assert settings.sampling.max_tokens == (1024 if size == "405b" else 2048)
            assert settings.sampling.temperature == 1.0


@pytest.mark.parametrize("size", ["8b", "70b", "405b"])
def test_the_rate_of_rl_goes_as_published(size):
    """Constant in Tulu 3.1; PPO's falls to 0 over the command's episodes, of which 405B's released model had 75 steps."""
    optim = load(GrpoSettings, str(EXAMPLES / f"tulu3/{size}/grpo.toml")).optim
    of_ppo = load(PpoSettings, str(EXAMPLES / f"tulu3/{size}/ppo.toml")).optim
    if size == "8b":
        assert (optim.schedule, optim.warmup) == ("constant", 0.0)
        assert (of_ppo.schedule, of_ppo.warmup, of_ppo.min_lr) == ("linear", 0.0, 0.0)
        return
    assert of_ppo == optim
    published = RL["tulu3", size]
    steps = published["episodes"] // published["rollouts"]
    end = 1 - 75 / steps if size == "405b" else 0.0
    assert (optim.schedule, optim.warmup) == ("linear", 0.1 if size == "70b" else 0.0)
    assert optim.min_lr == pytest.approx(end * optim.lr, rel=0.01)


@pytest.mark.parametrize("file", RECIPES, ids=named)
def test_a_command_in_a_recipe_s_head_has_its_layout(file):
    """Ranks by torchrun are as many as the layout has; `--parallel.data` overrides it."""
    settings = load(KINDS[stage(file)], str(file))
    text = re.sub(r"\\\n# *", "", file.read_text())
    for nodes, flags in re.findall(r"^#.* NNODES=(\d+) \.\.\. examples/launch/torchrun\.sh (.*)$", text, re.MULTILINE):
        data = re.search(r"--parallel\.data (\d+)", flags)
        replicas = int(data[1]) if data else settings.parallel.data
        assert replicas is None or replicas * settings.parallel.model_parallel == 8 * int(nodes)
    for line in re.findall(r"^#.* tulu-mega serve (.*)$", text, re.MULTILINE):
        timeout = re.search(r"--rollout\.start_timeout (\d+)", line)
        assert float(timeout[1] if timeout else 600) == settings.rollout.start_timeout
        tensor = re.search(r"--rollout\.tensor (\d+)", line)
        assert int(tensor[1] if tensor else 1) == settings.rollout.tensor


def test_runs_share_what_is_tokenised():
    files = [file for file in RECIPES if stage(file) not in ("grpo", "ppo")]
    assert {load(KINDS[stage(file)], str(file)).data.cache for file in files} == {"runs/tokenised"}


def test_fp8_is_the_same_run_but_for_its_matrix_products():
    plain = load(SftSettings, str(EXAMPLES / "tulu3/405b/sft.toml")).model_dump()
    fp8 = load(SftSettings, str(EXAMPLES / "tulu3/405b/sft_fp8.toml")).model_dump()
    assert fp8.pop("precision")["fp8"] == "tensorwise" and plain.pop("precision")["fp8"] == "off"
    assert fp8.pop("run_dir") != plain.pop("run_dir")
    fp8["train"].pop("micro_batches"), plain["train"].pop("micro_batches")  # how the batch is cut, which changes nothing
    assert fp8 == plain


@pytest.mark.parametrize("file", ADAPTERS, ids=named)
def test_adapters_train_in_the_same_run_at_ten_times_the_rate(file):
    kind = KINDS[stage(file)]
    plain, thin = (load(kind, str(each)).model_dump() for each in (file.with_stem(stage(file)), file))
    assert plain.pop("lora") is None and thin.pop("lora")["targets"] == "all-linear"
    assert thin["optim"].pop("lr") == pytest.approx(10 * plain["optim"].pop("lr"))
    for each in (plain, thin):  # where it lies and how it is cut, which changes nothing
        for table in ("run_dir", "parallel"):
            del each[table]
        del each["model"]["recompute"], each["data"]["pack_length"], each["checkpoint"]["asynchronous"]
        each["train"].pop("micro_batches", None)
    assert thin == plain


PPO_FLAGS = """
exp_name dataset_mixer dataset_train_splits dataset_eval_mixer dataset_eval_splits max_token_length max_prompt_token_length
response_length model_name_or_path reward_model_path non_stop_penalty stop_token temperature ground_truths_key chat_template
sft_messages_key learning_rate total_episodes penalty_reward_value deepspeed_stage per_device_train_batch_size
local_rollout_forward_batch_size local_mini_batch_size local_rollout_batch_size actor_num_gpus_per_node
vllm_tensor_parallel_size beta apply_verifiable_reward output_dir seed num_evals save_freq reward_model_multiplier
gradient_checkpointing with_tracking warmup_ratio vllm_num_engines no_gather_whole_model dataset_mixer_list
dataset_mixer_list_splits dataset_mixer_eval_list dataset_mixer_eval_list_splits num_epochs vllm_enforce_eager
no_try_launch_beaker_eval_jobs try_launch_beaker_eval_jobs_on_weka hf_metadata_dataset model_revision reward_model_revision
chat_template_name
""".split()
"""Of the commands of Tulu 3 8B, 70B and 405B in open-instruct's docs/tulu3.md and of OLMo 2 in olmo2_1124.sh."""
MEANINGLESS = {
    "vllm_enforce_eager", "no_try_launch_beaker_eval_jobs", "try_launch_beaker_eval_jobs_on_weka", "hf_metadata_dataset",
}  # fmt: skip


def test_every_flag_of_the_published_ppo_commands_has_its_setting():
    page = (EXAMPLES.parent / "docs/reference/recipes_vs_ai2.md").read_text()
    section = page[page.index("### PPO, Tulu 3") : page.index("## OLMo 2")]
    rows = [line.split("|")[1:3] for line in section.splitlines() if line.startswith("| `--")]
    told = {flag: ours for theirs, ours in rows for flag in re.findall(r"--([a-z_]+)", theirs)}
    assert set(PPO_FLAGS) <= told.keys(), set(PPO_FLAGS) - told.keys()
    assert {flag for flag in PPO_FLAGS if told[flag].strip() == "none"} == MEANINGLESS
    known = {row[0] for row in describe(PpoSettings)}
    named = {name for ours in told.values() for name in re.findall(r"`([a-z_]+\.[a-z_]+)`", ours)}
    assert named - {"value.parallel"} <= known, named - known
    assert {"value.parallel.tensor", "value.clip"} <= known


def test_the_settings_that_the_page_on_tulu3_names_are_there():
    known = {row[0] for kind in KINDS.values() for row in describe(kind)} | {"value.parallel"}
    sections = "|".join({name.partition(".")[0] for name in known if "." in name})
    page = (EXAMPLES.parent / "docs/reference/recipes_vs_ai2.md").read_text()
    named = set(re.findall(rf"`((?:{sections})\.[a-z_]+)`", page))
    assert len(named) > 45 and named <= known, named - known
