"""Which settings decide the result of a run: a table of those that do not, and a new one that does by itself."""

from __future__ import annotations

from typing import Annotated

import pytest

from tulu_mega.config import RmSettings, Section, SftSettings, describe
from tulu_mega.config.effects import Effect, decides, effect_of
from tulu_mega.config.stages import STAGES
from tulu_mega.launch.launcher import resolve

LENGTH = {"train.steps", "train.epochs"}
EVERYWHERE = """
    model.spec model.attention model.kernels model.recompute model.recompute_layers model.trust_remote_code
    parallel.tensor parallel.pipeline parallel.virtual_pipeline parallel.first_stage_layers parallel.last_stage_layers
    parallel.context parallel.data parallel.sequence parallel.distributed_optimizer parallel.overlap_grad_reduce
    parallel.overlap_param_gather parallel.bucket_size parallel.grad_dtype ddp
    watchdog.timeout run_dir accept_changes
    checkpoint.every checkpoint.keep checkpoint.format checkpoint.asynchronous checkpoint.grace
    checkpoint.export checkpoint.export_dtype wandb.mode wandb.project wandb.name
    data.pack_length train.max_skipped train.spike.action train.spike.factor train.spike.window
    train.straggler.every train.straggler.factor train.straggler.reports train.log_every
    train.profile.step train.profile.steps train.profile.ranks
    heldout.data heldout.split heldout.every
"""
CONTENT = {"model.path", "data.train", "data.split", "data.tokenizer", "lora.adapter"}
ROWS = "data.cache data.workers train.micro_batches heldout.batch"
ROLLOUTS = """
        rollout.servers rollout.tensor rollout.python rollout.urls rollout.adapters rollout.max_model_len rollout.random_weights
        rollout.gpu_memory rollout.cpu_cache_gib rollout.concurrency rollout.transport rollout.bucket_mib
        rollout.start_timeout rollout.request_timeout
        rollout.update_timeout rollout.retries rollout.restarts rewards.workers rewards.timeout rewards.memory_mib
        train.share_prompts train.rollouts_every restarts
"""
OWN_LAYOUT = " ".join(f" value.{name}" for name in EVERYWHERE.split() if name.startswith("parallel."))
"""Of the value model."""
INDIFFERENT = {
    "sft": ROWS,
    "rm": ROWS,
    "dpo": ROWS + " reference.cache reference.only",
    "grpo": ROLLOUTS,
    "ppo": ROLLOUTS + OWN_LAYOUT,
}
FURTHER = {"grpo": {"rewards.model", "rewards.custom"}, "ppo": {"rewards.model", "rewards.custom", "value.path"}}
"""Content that a stage names besides."""


@pytest.mark.parametrize("name", STAGES)
def test_what_does_not_decide(name):
    settings = resolve(STAGES[name].settings)
    effects = {row[0]: effect_of(settings, row[0]) for row in describe(settings)}
    of = {effect: {each for each in effects if effects[each] is effect} for effect in Effect}
    assert of[Effect.NONE] == {*EVERYWHERE.split(), *INDIFFERENT[name].split()}
    assert of[Effect.LENGTH] == LENGTH
    assert of[Effect.CONTENT] == CONTENT | FURTHER.get(name, set())
    assert all(effects.values())


class _Inner(Section):
    rate: float = 1.0
    workers: Annotated[int, Effect.NONE] = 1


class _Outer(Section):
    inner: _Inner | None = None
    quiet: Annotated[_Inner, Effect.NONE] = _Inner()
    table: dict[str, int] = {}


@pytest.mark.parametrize(
    ("name", "effect"),
    [
        ("inner.rate", Effect.DECIDES),
        ("inner.workers", Effect.NONE),
        ("inner", Effect.DECIDES),
        ("quiet.rate", Effect.NONE),
        ("table.a file.jsonl", Effect.DECIDES),
        ("inner.gone", None),
        ("gone", None),
    ],
)
def test_a_setting_decides_unless_it_or_its_section_says_otherwise(name, effect):
    assert effect_of(_Outer, name) is effect


def test_the_first_class_that_has_a_setting_says():
    assert decides([RmSettings, SftSettings], "train.reduction") is Effect.DECIDES
    assert decides([RmSettings, SftSettings], "train.of_an_earlier_version") is Effect.DECIDES
    assert decides([RmSettings, SftSettings], "watchdog.of_an_earlier_version") is Effect.NONE
    assert decides([RmSettings, SftSettings], "of_an_earlier_version") is Effect.NONE
