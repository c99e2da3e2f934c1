"""megatron-core's optimizer whose state and updates are in main memory (`[optimizer] optimizer_cpu_offload`), with two faults of
0.16.1 corrected that change what a run computes, and with support for a CPU as the device. The faults: the optimizer makes its
state by a step with random gradients, which moves the weights; and after a checkpoint was loaded, the part on the device begins
each step with the loaded count of steps.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

import torch
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer
from torch import Tensor

Groups = list[dict[str, Any]]


_WHERE = (
    *("offload_fraction", "cpu_optimizer_cls", "gpu_optimizer_cls", "param_update_in_fp32"),
    *("pin_cpu_grads", "pin_cpu_params", "overlap_cpu_optimizer_d2h_h2d"),
)
"""Fields of a group that the optimizers within do not have."""


class HostOptimizer(HybridDeviceOptimizer):
    """AdamW by torch in main memory for `offload_fraction` of the elements, by the device's own for the rest; float32 main
    parameters and moments for both.

    Takes the arguments of megatron-core's class.
    """

    def __init__(self, params, **arguments):
        if not torch.cuda.is_available():  # there is no other memory to pin, and no stream
            arguments |= {"pin_cpu_grads": False, "pin_cpu_params": False, "overlap_cpu_optimizer_d2h_h2d": False}
        super().__init__(params, **arguments)

    @torch.no_grad()
    def dummy_step(self) -> None:
        """Make every parameter's state as it is before the first step, without moving a weight."""
        for optimizer in self.sub_optimizers:
            for group in optimizer.param_groups:
                for p in group["params"]:
                    state = optimizer.state[p]
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
                    if optimizer is not self.gpu_optimizer:  # torch's counts for each parameter
                        state["step"] = torch.zeros(())
        self._sync_sub_optimizers_state_to_hdo()

    def state_dict(self) -> dict[str, Any]:
        """Return the state in the form of any AdamW: a checkpoint says neither where its state lay nor which class updated it."""
        found = super().state_dict()
        groups = [{name: value for name, value in group.items() if name not in _WHERE} for group in found["param_groups"]]
        return {**found, "param_groups": groups}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load as megatron-core does, and then count steps in the optimizers within."""
        groups = [{**self.defaults, **group} for group in state_dict["param_groups"]]  # one without offload has other fields
        super().load_state_dict({**state_dict, "param_groups": groups})
        for group in self.param_groups:
            group.pop("step", None)

    def _init_sub_optimizers(self) -> None:
        super()._init_sub_optimizers()
        if not torch.cuda.is_available():
            self._d2h_stream = self._h2d_stream = _NoStream()

    def _get_sub_optimizer_param_groups(self, offload_fraction: float):
        """Decide where each parameter is updated. Returns the groups in main memory, the groups on the device, the copy of each
        parameter, the parameter of each copy, and float32 copies."""
        if torch.cuda.is_available():
            return super()._get_sub_optimizer_param_groups(offload_fraction)
        most = offload_fraction * sum(p.numel() for group in self.param_groups for p in group["params"])
        taken = 0
        sides: dict[bool, Groups] = {True: [], False: []}
        copies: dict[Tensor, Tensor] = {}
        mains: dict[Tensor, Tensor] = {}
        for group in self.param_groups:
            split: dict[bool, list[Tensor]] = {True: [], False: []}
            for p in group["params"]:
                on_host = taken < most
                mains[p] = p.detach().clone().float()
                if on_host:
                    copies[p] = mains[p]
                    taken += p.numel()
                split[on_host].append(mains[p])
            for on_host, held in split.items():
                if held:
                    sides[on_host].append({**group, "params": held})
        return sides[True], sides[False], copies, {copy: p for p, copy in copies.items()}, mains

    def _move_new_state_to_right_device(self) -> None:
        if torch.cuda.is_available():
            super()._move_new_state_to_right_device()


class _NoStream:
    """A stream and an event for devices that do work at once."""

    def wait_stream(self, _stream: object) -> None: ...

    def record_event(self) -> _NoStream:
        return self

    def wait(self, _stream: object) -> None: ...

    def synchronize(self) -> None: ...


def install() -> None:
    """Replace megatron-core's class by this one."""
    for name in ("megatron.core.optimizer", "megatron.core.optimizer.distrib_optimizer"):
        importlib.import_module(name).HybridDeviceOptimizer = HostOptimizer
