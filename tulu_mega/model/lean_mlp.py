"""A gated feed-forward that keeps no activation."""

from __future__ import annotations

from megatron.core.tensor_parallel.random import CheckpointWithoutOutput
from megatron.core.transformer.mlp import MLP
from torch import Tensor


class LeanMLP(MLP):
    """megatron-core's MLP without a stored activation: it is computed again for the backward pass of the second product.

    megatron-core does so (`moe_act`) in its mixtures of experts only. There are no biases.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if self.config.fp8:  # else the layer keeps a copy in FP8 of what is let go here
            from megatron.core.extensions.transformer_engine import set_save_original_input

            set_save_original_input(self.linear_fc2)

    def forward(self, hidden_states: Tensor, per_token_scale: Tensor | None = None, **kwargs) -> tuple[Tensor, None]:
        """
        Args:
            hidden_states: [T, 1, H], or [T / TP, 1, H] under sequence parallelism.

        Returns:
            the same shape, and no bias.
        """
        gate_and_up, _no_bias = self.linear_fc1(hidden_states)
        activation = CheckpointWithoutOutput(fp8=self.config.fp8)
        product = activation.checkpoint(self.activation_func, gate_and_up)
        result, _no_bias = self.linear_fc2(product)
        activation.discard_output_and_register_recompute(result)
        return result, None
