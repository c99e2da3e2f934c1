"""What a stage will take under a layout: memory, a step's seconds, hours, and what is wrong with it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from tulu_mega.config import ParallelSettings, RunSettings
from tulu_mega.config.stages import STAGES
from tulu_mega.config.workload import Workload
from tulu_mega.errors import UserError
from tulu_mega.launch.launcher import resolve
from tulu_mega.layout.division import layout_problems, server_problems
from tulu_mega.layout.fp8 import fp8_problems, rollout_fp8_problems
from tulu_mega.layout.hardware import Gpu
from tulu_mega.layout.packing_rules import pack_alignment, pipeline_of
from tulu_mega.plan.model.calibration import RATES
from tulu_mega.plan.model.job import Job, Pack
from tulu_mega.plan.model.kernels import host_share, kernels_of, moment_bytes
from tulu_mega.plan.model.memory import (
    RankMemory,
    checkpoint_host_bytes,
    memory_by_rank,
    resume_host_bytes,
    state_host_bytes,
)
from tulu_mega.plan.model.parameters import ITEMSIZE
from tulu_mega.plan.model.rollouts import ServerMemory, Servers, generation_seconds, server_memory, sync_seconds
from tulu_mega.plan.model.storage import Storage, storage
from tulu_mega.plan.model.timing import Step, score_seconds, train_step
from tulu_mega.plan.model.workload import LABELLED, ROWS, draw_lengths, pack_step

_SAMPLED = 3
"""Global batches that a step's time is the mean of."""
_IDLE = 0.25
"""Share of waiting in a step above which there is a warning."""
_SPARE = 0.05
"""Share of a GPU's memory below which what is left is warned of: the plan was compared with no GPU yet."""


@dataclass(frozen=True)
class Question:
    """What is asked about.

    Args:
        stage: its name.
        settings: its settings.
        config: the model's config.json.
        gpu, gpus: the cluster, GPUs that generate among them; what the layout takes when `gpus` is None.
        rows: of the data, where it is known.
        mean_length, response_length: mean tokens, as in `PlanSettings`.
        rollout_gpu: of the servers; the trainers' kind when None.
        storage: bytes/s of the file system for checkpoints.
    """

    stage: str
    settings: RunSettings
    config: Mapping[str, Any]
    gpu: Gpu
    gpus: int | None
    rows: int | None = None
    mean_length: int | None = None
    response_length: int | None = None
    rollout_gpu: Gpu | None = None
    storage: float = 20e9

    @cached_property
    def workload(self) -> Workload:
        """What a step of the stage is made of."""
        return resolve(STAGES[self.stage].workload)(self.settings)

    @cached_property
    def servers(self) -> Servers | None:
        """Of a policy's rollouts."""
        rollout, model = self.workload.rollout, self.settings.model
        if rollout is None:
            return None
        return Servers(
            count=len(rollout.urls) or rollout.servers,
            tensor=rollout.tensor,
            gpu=self.rollout_gpu or self.gpu,
            concurrency=rollout.concurrency,
            share=rollout.memory_share,
            itemsize=ITEMSIZE[model.dtype if rollout.dtype == "model" else rollout.dtype],
            bucket=rollout.bucket_mib * 2**20,
            fp8=rollout.quantization == "fp8",
            elsewhere=bool(rollout.urls) or rollout.transport in ("nccl", "gloo"),
        )

    @cached_property
    def trainers(self) -> int:
        """Ranks that train.

        Raises:
            UserError: the layout does not divide them.
        """
        parallel = self.settings.parallel
        aside = self.servers.gpus if self.servers else 0
        if self.gpus is None:
            return parallel.model_parallel * (parallel.data or 1)
        left, replica = self.gpus - aside, parallel.model_parallel
        if left == replica * (parallel.data or max(1, left // replica)):
            return left
        generating = f", of which {aside} generate" if aside else ""
        sizes = f"parallel.tensor {parallel.tensor} x pipeline {parallel.pipeline} x context {parallel.context}"
        data = "" if parallel.data is None else f" x data {parallel.data}"
        lower = max(0, left) // replica
        counts = {max(1, lower), lower + (left % replica > 0)} - {0, parallel.data}
        others = [f"{each * replica + aside}" + (f" with --parallel.data {each}" if data else "") for each in sorted(counts)]
        own = [f"{replica * parallel.data + aside}"] if parallel.data else []
        raise UserError(
            f"gpus = {self.gpus}{generating}: {sizes}{data} = {replica * (parallel.data or 1)}"
            f"{', not' if data else ' does not divide'} the {left} that train; give {' or '.join(own + others)}, or another "
            "layout (--search)"
        )

    def job(self, lengths: list[int], labelled: list[int]) -> Job:
        """A step of these sequences.

        Raises:
            UserError: for lengths or a model that the layout cannot take.
        """
        settings, config, workload = self.settings, self.config, self.workload
        replicas = self.trainers // settings.parallel.model_parallel
        packs: tuple[tuple[Pack, ...], ...] = pack_step(
            lengths,
            labelled,
            replicas,
            workload.capacity,
            pack_alignment(settings),
            pipeline_of(config, settings),
            config["hidden_size"],
            config["intermediate_size"],
            micro_batches=workload.micro_batches,
            together=workload.sides,
        )
        return Job(
            config,
            settings.parallel,
            self.gpu,
            packs,
            dtype=settings.model.dtype,
            recompute=settings.model.recomputed,
            kernels=kernels_of(settings),
            fp8=settings.precision.recipe is not None,
            fp8_weights=settings.precision.fp8_param_gather,
            grad_bytes=ITEMSIZE[settings.parallel.grad_dtype],
            moment_bytes=moment_bytes(settings.optim, settings.optimizer),
            host_share=host_share(settings.optimizer),
            grad_copies=not settings.optimizer.get("use_precision_aware_optimizer", False),
            entropy=workload.entropy,
        )

    def sequences(self, seed: int) -> tuple[list[int], list[int]]:
        """A step's sequences: tokens, and how many of these are trained."""
        work = self.workload
        mean = self.mean_length or work.mean_length
        lengths = draw_lengths(work.rows * work.sides, mean, work.longest_row, seed)
        if not work.samples:
            return lengths, [max(1, round(LABELLED * length)) for length in lengths]
        mean_response = self.response_length or max(1, work.longest_response // 4)
        responses = draw_lengths(work.rows * work.samples, mean_response, work.longest_response, seed + 1)
        return [lengths[at // work.samples] + each for at, each in enumerate(responses)], responses

    @property
    def steps(self) -> int | None:
        """Of the whole stage; None where nobody says how many rows there are."""
        train, source = self.settings.train, self.settings.data.train
        if train.steps:
            return train.steps
        rows = self.rows or (ROWS.get(source) if isinstance(source, str) else None)
        return None if rows is None else math.ceil(rows * train.epochs / self.workload.rows)


@dataclass(frozen=True)
class Outlook:
    """What comes of it."""

    question: Question
    job: Job
    """one sampled step"""
    memory: list[RankMemory]
    step: Step
    """mean of the sampled steps; of a policy, all its updates together"""
    scoring: float
    """seconds of a step in which log-probabilities are computed without training"""
    generation: float
    sync: float
    servers: ServerMemory | None
    offloaded: float
    """bytes of a node's main memory that the optimizer's state takes all along"""
    host: float
    """bytes of a node's main memory that a save takes"""
    resume: float
    """and that going on from it takes, until the first step"""
    storage: Storage
    """seconds of a checkpoint"""
    once: float
    """seconds before the first step: the reference's log-probabilities"""
    padding: float
    """share of the packed positions"""
    problems: list[str] = field(default_factory=list)
    """for which the run would not start or not fit"""
    warnings: list[str] = field(default_factory=list)

    @property
    def gpus(self) -> int:
        """Of the whole run."""
        return self.job.world + (self.question.servers.gpus if self.question.servers else 0)

    @property
    def seconds(self) -> float:
        """Of a step, everything in it."""
        return self.step.seconds + self.scoring + self.generation + self.sync

    @property
    def fullest(self) -> RankMemory:
        """The pipeline rank with the least room."""
        return max(self.memory, key=lambda rank: rank.total)

    @property
    def fits(self) -> bool:
        """Whether every GPU has room."""
        return self.fullest.total <= self.job.gpu.memory and (
            self.servers is None or (self.servers.tokens > 0 and self.servers.sync <= self.servers.room)
        )

    @property
    def roomy(self) -> bool:
        """Whether enough is left of every GPU for a plan to be wrong by."""
        return self.job.gpu.memory - self.fullest.total >= _SPARE * self.job.gpu.memory

    @property
    def hours(self) -> float | None:
        """Of the whole stage, without saves, evaluations and start."""
        steps = self.question.steps
        return None if steps is None else (self.once + steps * self.seconds) / 3600


def outlook(question: Question, sampled: int = _SAMPLED) -> Outlook:
    """Plans a stage.

    Raises:
        UserError: with what the layout cannot do with this model, these GPUs or these lengths.
    """
    settings, work = question.settings, question.workload
    wrong = divisions(question)
    if wrong:
        raise UserError(wrong)
    drawn = [question.sequences(seed) for seed in range(sampled)]
    jobs = [[question.job(*part) for part in _mini_batches(one, work.mini_batches)] for one in drawn]
    job = jobs[0][0]
    made = [train_step(each, RATES) for one in jobs for each in one]
    scores_once = work.scores_once and question.steps
    forward = sum(score_seconds(each, RATES) for one in jobs for each in one) / len(jobs) if work.scorings or scores_once else 0.0
    servers = question.servers
    memory = memory_by_rank(job, work.reference + work.other_models, servers.bucket if servers else 0)
    generation = 0.0
    if servers:
        for lengths, responses in drawn:
            prompts = [length - response for length, response in zip(lengths, responses, strict=True)]
            generation += generation_seconds(question.config, servers, prompts, responses, RATES) / len(drawn)
    positions = sum(pack.tokens for one in jobs for each in one for packs in each.packs for pack in packs)
    result = Outlook(
        question=question,
        job=job,
        memory=memory,
        step=_mean(made, work.updates),
        scoring=forward * work.scorings,
        generation=generation,
        sync=sync_seconds(job, servers, RATES) if servers else 0.0,
        servers=server_memory(question.config, servers, job) if servers else None,
        offloaded=state_host_bytes(job),
        host=checkpoint_host_bytes(job, settings.checkpoint.format, settings.checkpoint.asynchronous),
        resume=resume_host_bytes(job),
        storage=storage(job, question.storage, settings.checkpoint.asynchronous),
        once=forward * question.steps / settings.train.epochs if scores_once else 0.0,
        padding=1 - sum(step.tokens for step in made) / positions,
    )
    result.problems.extend(_unfit(result))
    result.warnings.extend(_doubts(result))
    return result


def _mini_batches(drawn: tuple[list[int], list[int]], parts: int) -> list[tuple[list[int], list[int]]]:
    lengths, labelled = drawn
    bounds = [len(lengths) * part // parts for part in range(parts + 1)]
    return [(lengths[a:b], labelled[a:b]) for a, b in zip(bounds, bounds[1:], strict=False)]


def _mean(made: list[Step], updates: int) -> Step:
    """Steps' parts, their mean times the updates of a step."""
    factor = updates / len(made)
    parts = {name: sum(step.parts[name] for step in made) * factor for name in made[0].parts}
    tokens, flops = (sum(getattr(step, name) for step in made) * factor for name in ("tokens", "flops"))
    return Step(**parts, tokens=round(tokens), flops=flops, world=made[0].world)


def divisions(question: Question) -> list[str]:
    """What does not divide, all of it at once."""
    config, rollout = question.config, question.workload.rollout
    wrong = layout_problems(config, question.settings.parallel)
    if not wrong:
        wrong += fp8_problems(config, question.settings)
        wrong += rollout_fp8_problems(config, rollout) if rollout else []
    if rollout and not rollout.urls:
        wrong += server_problems(config, rollout.tensor)
    work = question.workload
    given = (
        ("mean_length", question.mean_length, work.longest_row),
        ("response_length", question.response_length, work.longest_response),
    )
    for name, mean, most in given:
        if mean and mean > most > 0:
            wrong.append(f"{name} = {mean} is more than the {most} tokens at which these are cut; give what is left of them")
    try:
        _ = question.trainers
    except UserError as error:
        wrong += error.problems
    return wrong


def _unfit(result: Outlook) -> list[str]:
    gib, found = 2**30, []
    full, room = result.fullest, result.job.gpu.memory
    if full.total > room:
        most = sorted(full.parts.items(), key=lambda part: -part[1])[:2]
        parts = " and ".join(f"{name} {size / gib:.1f}" for name, size in most)
        found.append(
            f"pipeline rank {full.rank} needs {full.total / gib:.1f} GiB of a GPU's {room / gib:.1f} GiB, most of it {parts}; "
            "raise tensor, pipeline or data parallelism, or recompute more (model.recompute); --search looks for what fits"
        )
    servers = result.servers
    if servers and servers.sync > servers.room:
        share = max(0.0, 1 - servers.sync / result.question.servers.gpu.memory)
        found.append(
            f"while weights arrive a server's GPU holds {servers.sync / gib:.1f} GiB of them beside what vLLM takes, and "
            f"rollout.gpu_memory leaves {servers.room / gib:.1f} GiB; set it to {math.floor(share * 100) / 100:g} or less"
        )
    if result.servers and not result.servers.tokens:
        found.append(
            f"a server's weights take {result.servers.weights / gib:.1f} GiB of each of its GPUs; with "
            f"{result.servers.working / gib:.0f} GiB to work in that is more than rollout.gpu_memory leaves of {room / gib:.1f} "
            "GiB; raise rollout.tensor"
        )
    return found


def _doubts(result: Outlook) -> list[str]:
    question, found = result.question, []
    left = result.job.gpu.memory - result.fullest.total
    if left >= 0 and not result.roomy:
        found.append(
            f"{left / 2**30:.1f} GiB are left of a GPU on pipeline rank {result.fullest.rank}, which a plan may be wrong by; "
            "lower data.pack_length, or recompute more (model.recompute)"
        )
    parallel, gpu = question.settings.parallel, question.gpu
    if parallel.tensor > gpu.domain:
        found.append(
            f"parallel.tensor = {parallel.tensor} spans more than the {gpu.domain} joined GPUs: its collectives take the network"
        )
    known, longest = question.config.get("max_position_embeddings"), question.workload.longest
    if known and longest > known:
        found.append(f"sequences of {longest} tokens are longer than the model's max_position_embeddings = {known}")
    if result.step.idle > _IDLE * result.step.seconds:
        count = len(result.job.packs[0])
        found.append(
            f"{result.step.idle / result.step.seconds:.0%} of a step is waiting: {count} micro-batches for "
            f"{parallel.pipeline} x {parallel.virtual_pipeline} pipeline stages on each of {result.job.data} replicas; "
            "lower data.pack_length or use fewer stages or replicas"
        )
    empty = sum(not pack.lengths for packs in result.job.packs for pack in packs)
    if empty:
        found.append(f"{empty} micro-batches are empty: a step has too few sequences for this layout")
    return found


def with_layout(question: Question, parallel: ParallelSettings, recompute: str | list[str], layers: int | None) -> Question:
    """The same question under another layout, with something else recomputed."""
    model = question.settings.model.model_copy(update={"recompute": recompute, "recompute_layers": layers})
    return replace(question, settings=question.settings.model_copy(update={"parallel": parallel, "model": model}))
