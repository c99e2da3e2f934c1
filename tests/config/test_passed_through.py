"""The tables whose fields go to megatron-core: what is refused, with the reason and what to do."""

from __future__ import annotations

import pytest

from tulu_mega.config import EngineSettings, SftSettings
from tulu_mega.config.megatron_fields import MEGATRON
from tulu_mega.config.passed_through import PassedThrough
from tulu_mega.config.training_fields import DDP, OPTIMIZER

pytestmark = pytest.mark.skipif(not MEGATRON.fields(), reason="megatron-core is not installed")
TABLES = (MEGATRON, DDP, OPTIMIZER)


def told(table: PassedThrough, **fields) -> str:
    with pytest.raises(ValueError) as raised:
        table.check(fields)
    return str(raised.value)


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.table)
def test_every_name_that_is_dealt_with_is_a_field(table):
    """A release that drops one shows here."""
    known = table.fields()
    assert known and table.owned.keys() | table.refused.keys() <= known.keys()
    assert not table.owned.keys() & table.refused.keys()
    for begin, first in table.refused_with.items():
        assert first in table.refused and any(name.startswith(begin) and name != first for name in known)


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.table)
def test_a_value_with_which_it_works_is_taken_and_others_not(table):
    for name, (works, why) in table.refused.items():
        if works is not None:
            table.check({name: works})
        for value in (True, False, "x", 7):
            if value != works:
                assert f"{name} = {value!r} cannot work here: {why}; leave it out" in told(table, **{name: value})
    for name, setting in table.owned.items():
        assert told(table, **{name: 1}) == f"{name} is decided by {setting}; set it there"


def test_all_problems_come_at_once_with_the_nearest_name():
    problems = told(DDP, pad_buckets_for_high_nccl_busbandwidth=True, bucket_size=7, nccl_ub="yes", average_in_collective=True)
    assert "pad_buckets_for_high_nccl_busbandwidth is not a field of megatron-core's DistributedDataParallelConfig; did you mean "
    assert "'pad_buckets_for_high_nccl_busbw'" in problems and "bucket_size is decided by parallel.bucket_size" in problems
    assert "nccl_ub = 'yes': megatron-core wants bool" in problems and "losses are sums" in problems
    assert "(overlap_grad_reduce is decided by parallel.overlap_grad_reduce)" in told(DDP, overlap_grad_reduces=True)
    assert "it means something only with tp_comm_overlap" in told(MEGATRON, tp_comm_bulk_wgrad=False)
    assert "did you mean 'tp_comm_bulk_wgrad'" in told(MEGATRON, tp_com_bulk_wgrad=False)


def test_what_is_right_passes():
    DDP.check({"pad_buckets_for_high_nccl_busbw": True, "nccl_ub": False, "reduce_scatter_with_fp32_accumulation": True})
    OPTIMIZER.check({"decoupled_lr": 1e-6, "apply_wd_to_qk_layernorm": True})
    MEGATRON.check({"bias_activation_fusion": True, "tp_comm_overlap": False, "batch_p2p_sync": True})


HOST = {"use_precision_aware_optimizer": True, "optimizer_cpu_offload": True, "optimizer_offload_fraction": 1.0}
SFT = {"run_dir": "run", "data": {"train": "rows.jsonl"}}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"model": {"recompute": "layernorms"}}, "layernorms; did you mean 'layernorm'?; expected 'none', 'selective', 'full'"),
        ({"model": {"recompute": 3}}, "3: expected 'none', 'selective', 'full', or a list of some of core_attn, layernorm"),
        ({"model": {"recompute": ["mlp", "activation"]}}, "'mlp' computes the activation again too; leave 'activation' out"),
        ({"model": {"recompute": ["mlp", "mlp"]}}, "mlp more than once: expected 'none'"),
        ({"model": {"recompute": []}}, "an empty list: expected 'none'"),
        ({"model": {"recompute": "mlp", "recompute_layers": 2}}, "recompute_layers = 2 needs recompute = 'full', got ['mlp']"),
        ({"model": {"recompute": "activation"}, "megatron": {"bias_activation_fusion": True}}, "bias_activation_fusion takes"),
        ({"model": {"recompute": "layernorm"}, "precision": {"fp8": "delayed"}}, "layernorm does not go with precision.fp8"),
        ({"model": {"dtype": "fp32"}, "parallel": {"grad_dtype": "bf16"}}, "needs model.dtype = 'bf16', got 'fp32'"),
        ({"optim": {"moments": "bf16", "name": "sgd"}}, "optim.moments = 'bf16' needs optim.name = 'adamw', got 'sgd'"),
        ({"optim": {"moments": "bf16"}, "parallel": {"distributed_optimizer": False}}, "parallel.distributed_optimizer"),
        ({"ddp": {"overlap_grad_reduce": True}}, "overlap_grad_reduce is decided by parallel.overlap_grad_reduce"),
        ({"optimizer": {"use_precision_aware_optimizer": True}, "optim": {"moments": "bf16"}}, "leave either out"),
        (
            {"optimizer": {"use_precision_aware_optimizer": True}, "checkpoint": {"format": "same_layout"}},
            "could not be read again; choose 'reshardable'",
        ),
        ({"optimizer": {"exp_avg_dtype": "bf16"}}, "exp_avg_dtype: only with use_precision_aware_optimizer = true"),
        ({"optimizer": {"optimizer_offload_fraction": 0.5}}, "only with optimizer_cpu_offload = true"),
        ({"optimizer": {"optimizer_cpu_offload": True}}, "needs optimizer_offload_fraction, above 0 and at most 1"),
        ({"optimizer": HOST | {"optimizer_offload_fraction": 1.5}}, "needs optimizer_offload_fraction, above 0 and at most 1"),
        ({"optimizer": HOST | {"use_precision_aware_optimizer": False}}, "needs use_precision_aware_optimizer = true"),
        ({"optimizer": HOST | {"exp_avg_dtype": "bf16"}}, "needs moments in float32, not exp_avg_dtype"),
        ({"optimizer": HOST, "model": {"dtype": "fp32"}}, "needs model.dtype = 'bf16'"),
        ({"optimizer": HOST, "optim": {"name": "sgd"}}, "needs optim.name = 'adamw' and parallel.distributed_optimizer"),
        ({"optimizer": HOST, "precision": {"fp8": "blockwise", "fp8_param_gather": True}}, "fp8_param_gather = false"),
        ({"optimizer": HOST | {"use_torch_optimizer_for_cpu_offload": True}}, "the optimizer is torch's, whatever it says"),
        ({"optimizer": {"exp_avg_sq_dtype": "fp8"}}, "exp_avg_sq_dtype = 'fp8': expected 'fp32' or 'bf16'"),
        ({"optimizer": {"main_grads_dtype": "bf16"}}, "main_grads_dtype is decided by parallel.grad_dtype"),
        ({"optimizer": {"adam_eps": 1e-9}}, "adam_eps is decided by optim.eps"),
        ({"megatron": {"use_te_activation_func": True}}, "use_te_activation_func = True cannot work here: in that place"),
        ({"megatron": {"tp_comm_overlap": True}}, "tp_comm_overlap = True cannot work here: Transformer Engine would look for"),
    ],
)
def test_what_does_not_go_together_is_refused(given, said):
    values = {**SFT, **given, "model": {"path": "model", **given.get("model", {})}}
    with pytest.raises(ValueError) as raised:
        SftSettings.model_validate(values)
    assert said in str(raised.value)


@pytest.mark.parametrize(
    ("given", "modules", "layers"),
    [
        ({"recompute": "none"}, set(), 0),
        ({"recompute": "selective"}, {"core_attn"}, 0),
        ({"recompute": "layernorm"}, {"layernorm"}, 0),
        ({"recompute": "layernorm, activation"}, {"layernorm", "activation"}, 0),
        ({"recompute": ["core_attn", "mlp"]}, {"core_attn", "mlp"}, 0),
        ({"recompute": "full"}, set(), None),
        ({"recompute": "full", "recompute_layers": 2}, set(), 2),
    ],
)
def test_ways_to_say_what_is_computed_again(given, modules, layers):
    settings = EngineSettings.model_validate({"model": {"path": "model", **given}})
    assert (settings.model.recomputed.modules, settings.model.recomputed.layers) == (modules, layers)
