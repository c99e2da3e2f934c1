"""What is asked about a stage: its settings, its models' figures, the cluster; and the sequences of a step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from tulu_mega.bridge.files.peft import resolved
from tulu_mega.config import ParallelSettings, RunSettings
from tulu_mega.config.lora import LoraSettings
from tulu_mega.config.stages import STAGES
from tulu_mega.config.workload import Workload
from tulu_mega.errors import UserError
from tulu_mega.launch.launcher import resolve
from tulu_mega.layout.hardware import Gpu
from tulu_mega.layout.packing_rules import pack_alignment, pipeline_of
from tulu_mega.plan.model.job import Job, Pack
from tulu_mega.plan.model.kernels import host_share, kernels_of, moment_bytes
from tulu_mega.plan.model.parameters import ITEMSIZE
from tulu_mega.plan.model.rollouts import Servers
from tulu_mega.plan.model.workload import LABELLED, ROWS, draw_lengths, pack_step


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
        value_config: config.json of a value model that trains beside.
        rewards_config: config.json of a reward model that scores responses.
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
    value_config: Mapping[str, Any] | None = None
    rewards_config: Mapping[str, Any] | None = None

    @cached_property
    def workload(self) -> Workload:
        """What a step of the stage is made of."""
        return resolve(STAGES[self.stage].workload)(self.settings)

    @cached_property
    def value(self) -> Question | None:
        """The same about the value model, as if it trained by itself on these GPUs; None without one."""
        work = self.workload.value
        if work is None or self.value_config is None:
            return None
        return self._of(work.path, self.value_config, work.parallel)

    @cached_property
    def rewards(self) -> Question | None:
        """The same about the reward model that scores responses, under the policy's layout; None without one."""
        path = self.workload.rewards
        if path is None or self.rewards_config is None:
            return None
        return self._of(path, self.rewards_config, self.settings.parallel)

    def _of(self, path: str, config: Mapping[str, Any], parallel: ParallelSettings) -> Question:
        """About another model as if it were alone on these GPUs."""
        gpus = self.trainers + (self.servers.gpus if self.servers else 0)
        model = self.settings.model.model_copy(update={"path": path})
        own = self.settings.model_copy(update={"lora": None, "parallel": parallel, "model": model})
        return replace(self, settings=own, config=config, value_config=None, rewards_config=None, gpus=gpus)

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
            lora=self.lora,
        )

    @cached_property
    def lora(self) -> LoraSettings | None:
        """Adapters that train beside frozen weights.

        Raises:
            UserError: of a directory that cannot be read.
        """
        return resolved(self.settings.lora)

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


def with_layout(question: Question, parallel: ParallelSettings, recompute: str | list[str], layers: int | None) -> Question:
    """The same question under another layout, with something else recomputed."""
    model = question.settings.model.model_copy(update={"recompute": recompute, "recompute_layers": layers})
    return replace(question, settings=question.settings.model_copy(update={"parallel": parallel, "model": model}))
