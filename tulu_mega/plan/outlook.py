"""What a stage will take under a layout: memory, a step's seconds, hours, and what is wrong with it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import reduce
from operator import add

from tulu_mega.errors import UserError
from tulu_mega.layout.blocks import block_problems
from tulu_mega.layout.division import layout_problems, server_problems
from tulu_mega.layout.fp8 import fp8_problems, rollout_fp8_problems
from tulu_mega.plan.model.calibration import RATES
from tulu_mega.plan.model.job import Job
from tulu_mega.plan.model.memory import (
    RankMemory,
    beside_a_value_model,
    memory_by_rank,
    resume_host_bytes,
    state_host_bytes,
    together_host_bytes,
)
from tulu_mega.plan.model.rollouts import ServerMemory, generation_seconds, server_memory, sync_seconds
from tulu_mega.plan.model.storage import Storage, storage
from tulu_mega.plan.model.timing import Step, mean_step, score_seconds, train_step
from tulu_mega.plan.question import Question
from tulu_mega.plan.reward_outlook import RewardOutlook, reward_outlook
from tulu_mega.plan.value_outlook import ValueOutlook, value_outlook

_SAMPLED = 3
"""Global batches that a step's time is the mean of."""
_IDLE = 0.25
"""Share of waiting in a step above which there is a warning."""
_SPARE = 0.05
"""Share of a GPU's memory below which what is left is warned of: the plan was compared with no GPU yet."""


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
    value: ValueOutlook | None = None
    """of a value model that trains beside"""
    rewards: RewardOutlook | None = None
    """of a reward model that scores responses"""

    @property
    def gpus(self) -> int:
        """Of the whole run."""
        return self.job.world + (self.question.servers.gpus if self.question.servers else 0)

    @property
    def seconds(self) -> float:
        """Of a step, everything in it."""
        return self.training + self.generation - self.beside + self.sync

    @property
    def training(self) -> float:
        """Seconds of a step without generation and what goes to the servers."""
        others = (self.value.seconds if self.value else 0.0) + (self.rewards.scoring if self.rewards else 0.0)
        return self.step.seconds + others + self.scoring

    @property
    def beside(self) -> float:
        """Seconds in which servers generate and ranks train."""
        return min(self.training, self.generation) if self.question.workload.beside else 0.0

    @property
    def flops_per_gpu(self) -> float:
        """Model FLOP/s of a GPU while it trains, whichever model."""
        steps = [self.step, *([self.value.step] if self.value else [])]
        return sum(step.flops for step in steps) / sum(step.seconds for step in steps) / self.job.world

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
    adapted = question.lora is not None  # whose reference is a copy of the adapters, with another while it is scored with
    bucket, reference = servers.bucket if servers else 0, int(work.reference)
    memory = memory_by_rank(job, 0 if adapted else reference, bucket, 2 * reference if adapted else 0)
    value = _value(question, drawn) if question.value else None
    if value:
        memory = beside_a_value_model(memory, value.by_policys_rank(job), groups=value.has_groups(job))
    rewards = reward_outlook([question.rewards.job(*one) for one in drawn]) if question.rewards else None
    if rewards:
        memory = rewards.beside(memory)
    saved = [job, *([value.job] if value else [])]
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
        step=mean_step(made, work.updates),
        scoring=forward * work.scorings,
        generation=generation,
        sync=sync_seconds(job, servers, RATES) if servers else 0.0,
        servers=server_memory(question.config, servers, job) if servers else None,
        offloaded=sum(map(state_host_bytes, saved)),
        host=together_host_bytes(saved, settings.checkpoint.format, settings.checkpoint.asynchronous),
        resume=max(map(resume_host_bytes, saved)),
        storage=reduce(add, (storage(each, question.storage, settings.checkpoint.asynchronous) for each in saved)),
        once=forward * question.steps / settings.train.epochs if scores_once else 0.0,
        padding=1 - sum(step.tokens for step in made) / positions,
        value=value,
        rewards=rewards,
    )
    result.problems.extend(_unfit(result))
    result.warnings.extend(_doubts(result))
    return result


def _mini_batches(drawn: tuple[list[int], list[int]], parts: int) -> list[tuple[list[int], list[int]]]:
    lengths, labelled = drawn
    bounds = [len(lengths) * part // parts for part in range(parts + 1)]
    return [(lengths[a:b], labelled[a:b]) for a, b in zip(bounds, bounds[1:], strict=False)]


def _value(question: Question, drawn: Sequence[tuple[list[int], list[int]]]) -> ValueOutlook:
    """Of the value model, on the policy's sequences.

    Args:
        drawn: of :meth:`Question.sequences`.
    """
    work, asked = question.workload, question.value
    jobs = [[asked.job(*part) for part in _mini_batches(one, work.mini_batches)] for one in drawn]
    return value_outlook(jobs, work.updates * work.value.updates, work.value.scorings)


def divisions(question: Question) -> list[str]:
    """What does not divide, all of it at once."""
    config, rollout = question.config, question.workload.rollout
    wrong = _of_layout(question)
    if not wrong:
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
        return wrong + error.problems
    for name, other in {"value model": question.value, "reward model": question.rewards}.items():
        wrong += [f"{name}: {problem}" for problem in _beside(other)] if other else []
    return wrong


def _beside(question: Question) -> list[str]:
    """What does not divide of a model beside a policy, which no server has."""
    wrong = _of_layout(question)
    try:
        _ = question.trainers
    except UserError as error:
        wrong += error.problems
    return wrong


def _of_layout(question: Question) -> list[str]:
    """What does not divide of a model that trains, or is scored with."""
    wrong = layout_problems(question.config, question.settings.parallel)
    wrong += block_problems(question.config, question.lora, question.settings.parallel)
    return wrong or fp8_problems(question.config, question.settings)


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
