"""The training engine: megatron-core's schedules, DDP and optimizer behind `forward_backward`, `optimizer_step` and `score`. It
knows no algorithm by name."""

from __future__ import annotations

import contextlib
import functools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, SupportsFloat

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from torch import Tensor
from transformers import PretrainedConfig

from tulu_mega.bridge.families import family_for
from tulu_mega.config import EngineSettings, OptimSettings
from tulu_mega.config.lora import LoraSettings
from tulu_mega.distributed.topology import Topology, in_its_layout
from tulu_mega.layout.context import context_rows, context_share
from tulu_mega.model.build import attention_of, build_model, wrap_for_training
from tulu_mega.model.gpt import PolicyModel
from tulu_mega.model.lora import attach
from tulu_mega.model.messages import PackMessages
from tulu_mega.model.packed import packed_seq_params
from tulu_mega.model.quantized import quantize_layers
from tulu_mega.model.reward import RewardModel
from tulu_mega.platforms import Platform
from tulu_mega.records import LossOutput, PackedBatch, Reads, TokenOutput, sent
from tulu_mega.train.batch_loss import ReducedLoss, reduced, scalar
from tulu_mega.train.finalize import finalize_gradients
from tulu_mega.train.micro_batches import SentOnce, needed
from tulu_mega.train.optimizer import Schedule, build_optimizer, decoupled_gradients

_GROUPS = ["tp", "cp", "pp", "embd", "pos_embd", "dp_cp"]
"""Process groups that a schedule needs where it gets the object that sends its messages."""


class Objective(Protocol):
    """A loss that the engine minimises; `objectives/` has them."""

    @property
    def reads(self) -> Reads:
        """Which output of the model the objective is called with."""

    @property
    def reported(self) -> tuple[str, ...]:
        """Names in `LossOutput.metrics`, which are reported as means."""

    @property
    def largest(self) -> tuple[str, ...]:
        """Names in `LossOutput.largest`, which are reported as largest values."""

    def __call__(self, output: TokenOutput | Tensor, batch: PackedBatch) -> LossOutput: ...


@dataclass(frozen=True)
class Update:
    """The result of an optimizer step, the same on every rank."""

    grad_norm: float
    """global, before clipping"""
    lr: float
    applied: bool
    """False when loss or gradient was not finite, or not allowed: parameters and optimizer state stay as they were"""
    finite: bool
    known: float
    """`time.perf_counter` when the norm was known: the batch's forward and backward passes were done"""


class Engine:
    """A model under a layout, ready to train or to score.

    Args:
        hf: the model's Hugging Face config.
        settings: model, layout and `[megatron]` table.
        topology, platform: this process's place among the ranks, and its device.
        reward: whether the model is a reward model, which gives scores instead of log-probabilities.
        temperature: divides the logits, in training and in scoring. Of a policy, the temperature at which responses are sampled.
        at: called with the name of each piece of work as it begins; see `watchdog.Watchdog.at`.
        shares: whether sequences are to share prefixes within a pack, where the layout lets them (:attr:`whole_packs`).
        lora: low-rank adapters, which alone are trained then.
    """

    def __init__(
        self,
        hf: PretrainedConfig,
        settings: EngineSettings,
        topology: Topology,
        platform: Platform,
        reward: bool = False,
        temperature: float = 1.0,
        at: Callable[[str], None] = lambda _doing: None,
        shares: bool = False,
        lora: LoraSettings | None = None,
    ):
        self.hf, self.settings, self.topology, self.platform, self.reward = hf, settings, topology, platform, reward
        with topology.entered():
            quantized = lora is not None and lora.quantized
            chunks = build_model(hf, settings, topology, platform, reward, shares, lora is not None, quantized)
        self.chunks: list[PolicyModel] | list[RewardModel] = chunks
        """this rank's part of the model: one chunk, or as many as it has virtual pipeline stages"""
        self.lora = lora
        if lora:
            with topology.entered():
                if lora.quantized:
                    quantize_layers(chunks, lora, family_for(hf.to_dict()), hf.to_dict(), topology)
                attach(chunks, lora, family_for(hf.to_dict()), hf.to_dict(), topology)
        self.temperature, self.at, self.shares = temperature, at, shares
        self.ddp: list[DistributedDataParallel] = []
        """each chunk in its gradient buffers; empty, as the three below are None, until :meth:`prepare_training`"""
        self.optim: OptimSettings | None = None
        self.optimizer: MegatronOptimizer | None = None
        self.schedule: Schedule | None = None

    @functools.cached_property
    def whole_packs(self) -> bool:
        """Whether attention is our own and each rank has all of a pack: then sequences in a pack may share prefixes."""
        attention = attention_of(self.hf, self.settings, self.topology, self.platform, self.shares)
        return self.topology.context == 1 and attention != "te"

    @in_its_layout
    def prepare_training(
        self, optim: OptimSettings, steps: int, ddp: Mapping[str, Any] | None = None, optimizer: Mapping[str, Any] | None = None
    ) -> None:
        """Add gradient buffers, optimizer and learning-rate schedule. Load the weights before.

        Args:
            ddp, optimizer: further fields of megatron-core's configurations of these, the settings' tables of that name.

        Raises:
            UserError: when megatron-core refuses these.
        """
        self.optim = optim
        for chunk in self.chunks:
            chunk.train()
        parallel = self.settings.parallel
        sharded = parallel.distributed_optimizer and optim.name == "adamw"  # SGD has no state to shard
        self.ddp = wrap_for_training(self.chunks, parallel, sharded, ddp or {})
        self.optimizer = build_optimizer(
            optim, self.settings.model.dtype, self.ddp, sharded, self.platform.backend == "nccl", optimizer or {}
        )
        self.schedule = Schedule(self.optimizer, optim, steps)
        config = self.chunks[0].config  # all chunks share it
        config.finalize_model_grads_func = functools.partial(finalize_gradients, self.topology)
        if parallel.overlap_grad_reduce:
            several = len(self.ddp) > 1  # the schedules want a list then, and only then
            config.no_sync_func = [ddp.no_sync for ddp in self.ddp] if several else self.ddp[0].no_sync
            config.grad_sync_func = [ddp.start_grad_sync for ddp in self.ddp] if several else self.ddp[0].start_grad_sync

    @in_its_layout
    def forward_backward(
        self,
        micro_batches: Sequence[PackedBatch],
        objective: Objective,
        seen: list[Tensor] | None = None,
        marks: Callable[[], Sequence[bool]] = tuple,
    ) -> ReducedLoss:
        """Compute the gradients of a global batch: summed over micro-batches and DP x CP, divided once by the global count.

        Args:
            micro_batches: this data-parallel rank's share, whole packs; every rank of a replica gets the same, all replicas as
                many. An interleaved pipeline takes a multiple of its ranks.
            seen: a list that gets the tensors which :meth:`score` would have returned.
            marks: called once all work is handed to the device; returns flags of this rank for the other ranks, as many on
                each rank. They travel with the loss (`ReducedLoss.marks`).
        """
        for ddp in self.ddp:
            ddp.zero_grad_buffer()
        self.optimizer.zero_grad()
        return self._losses(micro_batches, objective, forward_only=False, seen=seen, marks=marks)

    @torch.no_grad()
    @in_its_layout
    def evaluate(self, micro_batches: Sequence[PackedBatch], objective: Objective) -> ReducedLoss:
        """Compute the loss of a batch by the current weights, in evaluation mode and without gradients.

        Args:
            micro_batches: as for :meth:`forward_backward`.
        """
        with self._evaluating():
            return self._losses(micro_batches, objective, forward_only=True)

    @in_its_layout
    def optimizer_step(self, step: int, loss: SupportsFloat, allow: Callable[[float, float], bool] | None = None) -> Update:
        """Clip the gradients by their global norm and update the weights, unless loss or norm is not finite.

        Args:
            step: from 0; decides the learning rate.
            loss: the loss of the gradients' batch. It is read after the norm, so that the host waits for the device once.
            allow: called with loss and norm where both are finite; returns whether to update, the same on every rank.
        """
        self.at("update")
        lr = self.schedule.set(step)
        self.optimizer.prepare_grads()
        norm = float(self.optimizer.get_grad_norm())  # megatron-core reads it: by then the device has done the whole batch
        known, value = time.perf_counter(), float(loss)
        finite = math.isfinite(value) and math.isfinite(norm)
        applied = finite and (allow is None or allow(value, norm))
        if applied:
            if self.optim.clip > 0:
                parameters = self.optimizer_parameters()
                if parameters:
                    clip_grad_by_total_norm_fp32(
                        parameters,
                        max_norm=self.optim.clip,
                        total_norm=norm,
                        use_decoupled_grad=decoupled_gradients(self.optimizer),
                    )
            self.optimizer.step_with_ready_grads()
        return Update(norm, lr, applied, finite, known)

    def optimizer_parameters(self) -> list[Tensor]:
        """Return the parameters, float32 main ones where there are any, that this rank's optimizer updates."""
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    @torch.no_grad()
    @in_its_layout
    def score(self, micro_batches: Sequence[PackedBatch]) -> list[Tensor]:
        """Compute the log-probabilities of the labels of every micro-batch.

        Args:
            micro_batches: as for :meth:`forward_backward`.

        Returns:
            [T] float32 for each micro-batch, in the pack's order, on the last pipeline stage; an empty list on the others.
        """

        def step(batches, model):
            return self._forward(model, next(batches)), lambda values, non_loss_data: values[0]

        with self._evaluating() as models:
            shares = self._run(step, micro_batches, models, forward_only=True, collect_non_loss_data=True)
        return self._wholes(shares, micro_batches)

    @torch.no_grad()
    def finite_weights(self) -> bool:
        """Return whether every weight is a finite number, the same on every rank. A collective; it takes no memory."""
        self.settle()
        held = [parameter for chunk in self.chunks for parameter in chunk.parameters()]
        held += self.optimizer_parameters() if self.optimizer else []  # the float32 ones, where the weights are of bf16
        extremes = [extreme.float() for tensor in held if tensor.numel() for extreme in tensor.aminmax()]
        finite = torch.stack(extremes).isfinite().all() if extremes else torch.tensor(True, device=self.platform.device)
        everywhere = finite.int()
        dist.all_reduce(everywhere, dist.ReduceOp.MIN)
        return bool(everywhere.item())

    @in_its_layout
    def settle(self) -> None:
        """Wait for parameter gathers that overlap left under way, so that every rank has the updated parameters. Call it before
        they are read."""
        for ddp in self.ddp:
            if ddp.ddp_config.overlap_param_gather:
                for group in ddp.bucket_groups:  # start_param_sync(force_sync=True) would leave transposed FP8 bytes as they were
                    group.finish_param_sync(skip_next_bucket_dispatch=True)

    def _losses(
        self,
        micro_batches: Sequence[PackedBatch],
        objective: Objective,
        forward_only: bool,
        seen: list[Tensor] | None = None,
        marks: Callable[[], Sequence[bool]] = tuple,
    ) -> ReducedLoss:
        outputs: list[LossOutput] = []
        shares: list[Tensor] = []

        def step(batches, model):
            batch = next(batches)

            def loss(output):
                out = self._loss(output, batch, objective)
                outputs.append(out)
                if seen is not None:
                    shares.append((output[0] if isinstance(output, tuple) else output)[0].detach())
                # a copy: a pipeline's schedule gives back the memory of what it is handed
                return out.loss_sum.float().clone(), scalar(out.count, torch.int32, self.platform.device), {}

            return self._forward(model, batch), loss

        entropy = objective.reads is Reads.TOKENS_WITH_ENTROPY
        self._run(step, micro_batches, self.ddp or self.chunks, forward_only, entropy=entropy)
        if seen is not None:
            seen += self._wholes(shares, micro_batches)
        mine = outputs if self.topology.reports_loss else ()
        return reduced(mine, objective.reported, objective.largest, marks(), self.platform.device)

    def _loss(self, output: Tensor | tuple[Tensor, Tensor], batch: PackedBatch, objective: Objective) -> LossOutput:
        """This rank's share of a micro-batch's loss."""
        values, entropy = output if isinstance(output, tuple) else (output, None)
        tokens = TokenOutput(
            values[0], None if entropy is None else entropy[0], batch, self._over_context, self.settings.model.kernels
        )
        if objective.reads in (Reads.TOKENS, Reads.TOKENS_WITH_ENTROPY):
            return objective(tokens, batch)
        # log-probabilities are 0 where not trained
        chosen_T = tokens.values_T * batch.ends_T if objective.reads is Reads.SEQUENCE_SCORE else tokens.values_T
        whole = objective(tokens.segment_sums(chosen_T), batch)
        if batch.context_rank == 0:
            return whole
        # every context rank has all of it and the first counts it; the gradient of the others' tokens comes from there
        return LossOutput(0 * whole.loss_sum, 0, dict.fromkeys(objective.reported, (0.0, 0)), whole.largest)

    def _over_context(self, share: Tensor) -> Tensor:
        if self.topology.context == 1:
            return share
        group = self.topology.context_group
        return copy_to_tensor_model_parallel_region(reduce_from_tensor_model_parallel_region(share, group), group)

    @contextlib.contextmanager
    def _evaluating(self) -> Iterator[list[torch.nn.Module]]:
        """The model in evaluation mode, and back in the mode it was in."""
        models = self.ddp or self.chunks
        training = [model.training for model in models]
        for model in models:
            model.eval()
        yield models
        for model, was in zip(models, training, strict=True):
            model.train(was)

    def _wholes(self, shares: list[Tensor], micro_batches: Sequence[PackedBatch]) -> list[Tensor]:
        """Return the whole pack's values of every micro-batch, on the stage that has any."""
        if self.topology.context == 1:
            return shares
        return [self._whole(share, batch) for share, batch in zip(shares, micro_batches, strict=False)]

    def _whole(self, share_T: Tensor, batch: PackedBatch) -> Tensor:
        """The context-parallel ranks' values of a pack, in its own order."""
        ranks = self.topology.context
        whole_T = share_T.new_empty(len(batch.tokens_T))
        gathered_T = torch.empty_like(whole_T)
        dist.all_gather_into_tensor(gathered_T, share_T.contiguous(), group=self.topology.context_group)
        rows = torch.cat([context_rows(batch.lengths_S, rank, ranks) for rank in range(ranks)])
        whole_T[sent(rows, whole_T.device)] = gathered_T
        return whole_T

    def _forward(self, model: torch.nn.Module, batch: PackedBatch) -> Tensor:
        self.at("forward and backward" if model.training else "forward")
        for chunk in self.chunks:
            if isinstance(chunk, PolicyModel):
                chunk.labelled_N = batch.labelled_N
        return model(
            input_ids=batch.tokens_T[None],
            position_ids=batch.positions_T[None],
            attention_mask=None,
            labels=batch.labels_T[None],
            packed_seq_params=packed_seq_params(batch, self.topology.context, self.chunks[0].config.apply_rope_fusion),
        )

    def _run(
        self,
        step,
        micro_batches: Sequence[PackedBatch],
        model: Sequence[torch.nn.Module],
        forward_only: bool = False,
        collect_non_loss_data: bool = False,
        entropy: bool = False,
    ) -> list:
        for chunk in self.chunks:
            if isinstance(chunk, PolicyModel):
                chunk.temperature, chunk.gives_entropy = self.temperature, entropy
        schedule = get_forward_backward_func()
        shares = [context_share(batch, self.topology.context_rank, self.topology.context) for batch in micro_batches]
        stage = needed(any(c.pre_process for c in self.chunks), any(c.post_process for c in self.chunks))
        iterators = SentOnce(shares, self.platform.device, stage, len(model)).iterators()
        config, pipeline = self.chunks[0].config, {}
        if self.topology.pipeline > 1:
            over = self.topology.tensor if config.sequence_parallel else 1
            rows_M = [len(share.tokens_T) // over for share in shares]
            pipeline["p2p_communicator"] = PackMessages(self.topology.pipeline_group, config, rows_M, len(model))
            pipeline["pg_collection"] = ProcessGroupCollection.use_mpu_process_groups(_GROUPS)
        return schedule(
            forward_step_func=step,
            data_iterator=iterators if len(model) > 1 else iterators[0],
            model=list(model),
            num_microbatches=len(micro_batches),
            seq_length=max(len(batch.tokens_T) for batch in micro_batches),  # not read: stages know every pack's length
            micro_batch_size=1,
            forward_only=forward_only,
            collect_non_loss_data=collect_non_loss_data,
            **pipeline,
        )
