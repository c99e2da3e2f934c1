"""Which fields of megatron-core's configurations of DDP and of the optimizer the `[ddp]` and `[optimizer]` tables may set."""

from __future__ import annotations

from typing import Any

from tulu_mega.config.passed_through import PassedThrough

_ENGINE = "the engine, which looks at loss and norm and leaves such steps out"
_FSDP = "it is of Megatron-FSDP, which nothing here builds"
DDP = PassedThrough(
    "ddp",
    "DistributedDataParallelConfig",
    {"core/distributed/distributed_data_parallel_config.py": "DistributedDataParallelConfig"},
    {
        "grad_reduce_in_fp32": "parallel.grad_dtype",
        "overlap_grad_reduce": "parallel.overlap_grad_reduce",
        "overlap_param_gather": "parallel.overlap_param_gather",
        "use_distributed_optimizer": "parallel.distributed_optimizer",
        "bucket_size": "parallel.bucket_size",
        "fp8_param_gather": "precision.fp8_param_gather",
        "check_for_nan_in_grad": _ENGINE,
        "check_for_large_grads": _ENGINE,
    },
    {
        "average_in_collective": (False, "losses are sums, which are divided once by the global count"),
        "num_distributed_optimizer_instances": (1, "the groups that several instances would share are not made"),
        "align_param_gather": (False, "it wants a function of the schedule that starts gathers, which the engine does not give"),
        "delay_wgrad_compute": (False, "it wants a schedule that asks for weights' gradients later, and ours does not"),
        "reuse_grad_buf_for_mxfp8_param_ag": (False, "it is of MXFP8, which Hopper does not have"),
        "use_megatron_fsdp": (False, _FSDP),
        "use_custom_fsdp": (False, _FSDP),
        "data_parallel_sharding_strategy": ("no_shard", _FSDP),
        "outer_dp_sharding_strategy": ("no_shard", _FSDP),
        "suggested_communication_unit_size": (None, _FSDP),
        "preserve_fp32_weights": (None, _FSDP),
        "keep_fp8_transpose_cache": (False, _FSDP),
        "fsdp_double_buffer": (False, _FSDP),
        "fsdp_manual_registration": (False, _FSDP),
    },
)

_OPTIM = {
    "lr": "optim.lr",
    "min_lr": "optim.min_lr",
    "weight_decay": "optim.weight_decay",
    "adam_beta1": "optim.betas",
    "adam_beta2": "optim.betas",
    "adam_eps": "optim.eps",
    "clip_grad": "optim.clip",
    "optimizer": "optim.name",
    "fp16": "model.dtype",
    "bf16": "model.dtype",
    "params_dtype": "model.dtype",
    "fp8_recipe": "precision.fp8",
    "use_distributed_optimizer": "parallel.distributed_optimizer",
    "overlap_param_gather": "parallel.overlap_param_gather",
    "main_grads_dtype": "parallel.grad_dtype",
    "timers": "the engine",
}
_SCALE = "losses of bf16 and float32 are not scaled"
_MUON = "optim.name has no muon"
_MAIN = "checkpoints have main parameters in float32"
_REFUSED: dict[str, tuple[Any, str]] = {
    "main_params_dtype": (None, _MAIN),
    "store_param_remainders": (False, _MAIN),
    "use_torch_optimizer_for_cpu_offload": (False, "in main memory the optimizer is torch's, whatever it says"),
    "loss_scale": (None, _SCALE),
    "initial_loss_scale": (None, _SCALE),
    "min_loss_scale": (None, _SCALE),
    "loss_scale_window": (None, _SCALE),
    "hysteresis": (None, _SCALE),
    "decoupled_weight_decay": (True, "of the two the optimizer is AdamW"),
    "sgd_momentum": (0.0, "optim.name = 'sgd' is plain"),
    "muon_momentum": (None, _MUON),
    "reuse_grad_buf_for_mxfp8_param_ag": (False, "it is of MXFP8, which Hopper does not have"),
    "overlap_param_gather_with_optimizer_step": (False, "the engine clips and updates all of the model at once"),
    "log_num_zeros_in_grad": (False, "nothing reads that number"),
    "barrier_with_L1_time": (False, "there are no such timers"),
    "config_logger_dir": ("", "settings are in the run's directory"),
}
OFFLOAD = "optimizer_cpu_offload"
OFFLOADED = ("optimizer_offload_fraction", "overlap_cpu_optimizer_d2h_h2d", "pin_cpu_grads", "pin_cpu_params")
"""Fields that mean something only with `OFFLOAD`."""
MOMENTS = ("exp_avg_dtype", "exp_avg_sq_dtype")
"""Types of the two moments, of Transformer Engine's AdamW (`use_precision_aware_optimizer`). Those that are scaled (fp16, FP8)
would want their scales in checkpoints."""
OPTIMIZER = PassedThrough(
    "optimizer",
    "OptimizerConfig",
    {"core/optimizer/optimizer_config.py": "OptimizerConfig"},
    _OPTIM,
    _REFUSED,
    {"muon_": "muon_momentum"},
    dict.fromkeys(MOMENTS, ("fp32", "bf16")),
)
