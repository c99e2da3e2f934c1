"""GPTModel whose output step gives a score for each token instead of logits: a reward model."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.distributed import ProcessGroup

from tulu_mega.model.gpt import PackedModel

HEAD = "output_layer.weight"
"""Name of the head's parameter, the same as a language model's."""


class RewardHead(torch.nn.Module):
    """An output layer of one row of weights, the same on every tensor rank; it computes in float32.

    Args:
        tensor_group: the ranks that share the tokens under sequence parallelism.
    """

    def __init__(self, config: TransformerConfig, tensor_group: ProcessGroup):
        super().__init__()
        device = torch.cuda.current_device()
        self.weight = torch.nn.Parameter(torch.empty(1, config.hidden_size, dtype=config.params_dtype, device=device))
        self.weight.sequence_parallel = config.sequence_parallel  # of its own tokens: megatron-core sums the gradients
        self.weight.is_embedding_or_output_parameter = True
        self._tensor_group = tensor_group if config.sequence_parallel else None

    def forward(self, input_: Tensor, weight: Tensor | None = None, runtime_gather_output: bool | None = None, **_unused):
        """Hidden states [T, 1, H], or [T / TP, 1, H] under sequence parallelism, to scores [T, 1, 1] in float32.

        What follows is computed alike on every tensor rank, so that backward each takes its own part of the gradient, nothing
        is summed.
        """
        scores = F.linear(input_.float(), self.weight.float())
        if self._tensor_group is not None:
            scores = gather_from_sequence_parallel_region(scores, tensor_parallel_output_grad=False, group=self._tensor_group)
        return scores, None


class RewardModel(PackedModel):
    """megatron-core's GPTModel under a head of one output, never tied to the embedding.

    ``forward(..., labels=labels)`` returns float32 scores [1, T] of every token on the last pipeline stage, whatever the labels;
    hidden states elsewhere. A sequence's score is that of its last trained token, `PackedBatch.ends_T`.

    Args:
        PackedModel's.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if self.post_process:
            self.output_layer = RewardHead(self.config, self.tp_group)  # GPTModel's, as large as the embedding, goes here

    def initialise_head(self, seed: int) -> None:
        """Draws the head from N(0, 1 / sqrt(H + 1)), where 1 / sqrt(H + 1) is the standard deviation.

        As Stiennon et al. (arXiv 2009.01325) and Tulu 3 (arXiv 2411.15124) have it.

        Args:
            seed: the same head follows from it under every layout.
        """
        if self.post_process:
            size = self.config.hidden_size
            drawn = torch.randn(1, size, generator=torch.Generator().manual_seed(seed)) / math.sqrt(size + 1)
            with torch.no_grad():
                self.output_layer.weight.copy_(drawn)

    def compute_language_model_loss(self, labels: Tensor, logits: Tensor) -> Tensor:
        """Return the scores. GPTModel calls this to turn logits into a loss.

        Args:
            labels: not read.
            logits: the scores, [T, 1, 1].
        """
        return logits[..., 0].transpose(0, 1)

    def sharded_state_dict(self, *args, **kwargs) -> dict:
        """megatron-core's description for distributed checkpoints, without the leave that it gives the head to differ in size:
        it is not padded, and a language model's is not to be cut to its own."""
        described = super().sharded_state_dict(*args, **kwargs)
        if self.post_process:
            key = next(key for key in described if key.endswith(HEAD))
            described[key].allow_shape_mismatch = False
        return described
