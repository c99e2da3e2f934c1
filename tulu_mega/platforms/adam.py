"""An Adam for machines that have neither Transformer Engine nor NVIDIA's apex (CPUs, bare CUDA).

megatron-core then falls back to torch's AdamW, whose ``step`` lives in every parameter's state; its reshardable optimizer
checkpoints expect it in the parameter group, as the fused implementations keep it.
"""

from __future__ import annotations

import importlib

import torch
from torch.optim.adamw import adamw


class GroupStepAdam(torch.optim.Optimizer):
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101) by torch's fused kernel, with ``step`` kept in the group.

    Takes the arguments megatron-core gives to apex's and Transformer Engine's ``FusedAdam``.
    """

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, adam_w_mode=True):
        if not adam_w_mode:
            raise ValueError("only decoupled weight decay (AdamW) is provided")
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self, closure=None):
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            done = int(group.get("step", 0))
            group["step"] = done + 1
            params = [p for p in group["params"] if p.grad is not None and p.numel() > 0]
            if not params:
                continue
            for p in params:
                if "exp_avg" not in self.state[p]:
                    self.state[p]["exp_avg"] = torch.zeros_like(p)
                    self.state[p]["exp_avg_sq"] = torch.zeros_like(p)
            steps = torch.full((len(params),), float(done), device=params[0].device)  # filled there: copies would be waited for
            beta1, beta2 = group["betas"]
            adamw(
                params,
                [p.grad for p in params],
                [self.state[p]["exp_avg"] for p in params],
                [self.state[p]["exp_avg_sq"] for p in params],
                [],
                list(steps),
                fused=True,
                amsgrad=False,
                beta1=beta1,
                beta2=beta2,
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
            )


def install() -> None:
    """Hands GroupStepAdam to megatron-core where it has found no fused Adam, in the place of apex's."""
    optimizer = importlib.import_module("megatron.core.optimizer")
    if optimizer.USING_PYTORCH_OPTIMIZER:
        optimizer.Adam = GroupStepAdam
        optimizer.USING_PYTORCH_OPTIMIZER = False
        distributed = importlib.import_module("megatron.core.optimizer.distrib_optimizer")
        distributed.Adam = GroupStepAdam  # the distributed optimizer refuses classes it does not know
        distributed.HAVE_APEX_OR_TE = distributed.USING_APEX_OPTIMIZER = True  # and is to look for `step` in the group
