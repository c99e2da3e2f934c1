"""megatron-core's optimizer and learning-rate schedule from our settings."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from tulu_mega.config import OptimSettings
from tulu_mega.config.training_fields import MOMENTS
from tulu_mega.errors import UserError
from tulu_mega.model.config import DTYPES
from tulu_mega.train.optimizer_boxes import places_of
from tulu_mega.train.rounded_adam import RoundedAdam


def build_optimizer(
    optim: OptimSettings,
    dtype: Literal["bf16", "fp32"],
    chunks: Sequence[DistributedDataParallel],
    sharded: bool,
    gloo_groups: bool,
    table: Mapping[str, Any],
) -> MegatronOptimizer:
    """AdamW (decoupled weight decay, none on norms and biases) or SGD, float32 main parameters when training in bf16.

    Moments in bf16 are our own AdamW's, whatever else is installed: Transformer Engine's rounds them to the nearest, and for a
    step makes all of them float32.

    Args:
        dtype: of the model's parameters.
        sharded: megatron-core's distributed optimizer, state sharded over the data-parallel group.
        gloo_groups: whether parallel_state was given gloo groups beside NCCL's.
        table: further fields of megatron-core's configuration, the settings' `[optimizer]`.

    Raises:
        UserError: when megatron-core refuses these.
    """
    fields = dict(
        optimizer="adam" if optim.name == "adamw" else "sgd",
        lr=optim.lr,
        min_lr=optim.min_lr,
        weight_decay=optim.weight_decay,
        adam_beta1=optim.betas[0],
        adam_beta2=optim.betas[1],
        adam_eps=optim.eps,
        sgd_momentum=0.0,
        clip_grad=optim.clip,
        bf16=dtype == "bf16",
        params_dtype=torch.bfloat16 if dtype == "bf16" else torch.float32,
        use_distributed_optimizer=sharded,
        overlap_param_gather=chunks[0].ddp_config.overlap_param_gather,
        fp8_recipe=chunks[0].config.fp8_recipe if chunks[0].config.fp8 else None,
        store_param_remainders=False,  # main parameters are whole, as checkpoints have them
    )
    fields |= {name: DTYPES[value] if name in MOMENTS else value for name, value in table.items()}
    on_host = bool(table.get("optimizer_cpu_offload"))
    try:
        config = OptimizerConfig(**fields | {"use_precision_aware_optimizer": False} if on_host else fields)
    except (AssertionError, ValueError, TypeError, RuntimeError) as error:
        raise UserError(f"[optimizer]: megatron-core refuses this: {error}") from None
    if on_host:  # set by its constructor, which asks for Transformer Engine's version on the way, wherever that is
        config.use_precision_aware_optimizer = config.use_precision_aware_optimizer_no_fp8_or_ds_fp8 = True
    optimizer = get_megatron_optimizer(config, list(chunks), use_gloo_process_groups=gloo_groups)
    for part in optimizer.chained_optimizers:
        if optim.moments == "bf16":
            model = {str(at): ddp.module.sharded_state_dict() for at, ddp in enumerate(chunks)}
            part.optimizer = RoundedAdam(part.optimizer.param_groups, places_of(part, model))
        if not gloo_groups and isinstance(part, DistributedOptimizer):  # gloo carries everything: its groups serve as they are
            part.data_parallel_group_gloo = part.data_parallel_group
        if part.init_state_fn is None:  # SGD without momentum has no state, yet loading a checkpoint calls this
            part.init_state_fn = lambda *_: None
        # a checkpoint may be due before any update: the first ones were skipped
        if on_host:
            part.optimizer.dummy_step()
        elif config.use_precision_aware_optimizer:  # megatron-core's function leaves out what Transformer Engine wants
            for parameter in part.get_parameters():
                part.optimizer.initialize_state(parameter, False)
        else:
            part.init_state_fn(part.optimizer, part.config)
    return optimizer


def decoupled_gradients(optimizer: MegatronOptimizer) -> bool:
    """Whether gradients are of another type than what is updated, and so lie beside autograd's."""
    return optimizer.chained_optimizers[0].config.use_precision_aware_optimizer_no_fp8_or_ds_fp8


class Schedule:
    """Learning rate as a function of the step: linear warm-up from 0, then linear, cosine or no decay.

    The rate of step s (from 0) is that of Hugging Face's schedules of the same name. Nothing needs saving.
    """

    def __init__(self, optimizer: MegatronOptimizer, optim: OptimSettings, steps: int):
        self._scheduler = OptimizerParamScheduler(
            optimizer,
            init_lr=0.0,
            max_lr=optim.lr,
            min_lr=optim.min_lr,
            lr_warmup_steps=warmup_steps(optim.warmup, steps),
            lr_decay_steps=max(steps, 1),
            lr_decay_style=optim.schedule,
            start_wd=optim.weight_decay,
            end_wd=optim.weight_decay,
            wd_incr_steps=max(steps, 1),
            wd_incr_style="constant",
        )

    def set(self, step: int) -> float:
        """Puts the rate of a step (from 0) into the optimizer and returns it."""
        self._scheduler.num_steps = step
        self._scheduler.step(increment=0)
        return self._scheduler.get_lr({})


def warmup_steps(share: float, steps: int) -> int:
    """Steps of warm-up: the share rounded up as Hugging Face does, and at least one left to train at full rate."""
    return min(math.ceil(share * steps), max(steps - 1, 0))
