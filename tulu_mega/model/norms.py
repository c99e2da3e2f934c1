"""RMS norms (Zhang and Sennrich, arXiv 1910.07467) in the places where megatron-core's layer has none that fits."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region, reduce_from_tensor_model_parallel_region
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor

from tulu_mega.errors import UserError
from tulu_mega.platforms.cpu_speed.norms import rms_norm
from tulu_mega.platforms.cpu_speed.served import serves


class RMSNorm(torch.nn.Module):
    """Root-mean-square norm whose weight takes part in sequence parallelism.

    Statistics are float32 whatever the activations are, as Hugging Face's Llama has it. On CUDA torch's kernel does all of it in
    one pass and rounds once, at the end, as Transformer Engine's does.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_unused):
        super().__init__()
        device = torch.cuda.current_device()
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype, device=device))
        self.weight.sequence_parallel = config.sequence_parallel  # megatron-core then sums its gradient over TP
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalises the last dimension."""
        if serves(x):
            return rms_norm(x, self.weight, self.eps)
        if x.dtype == torch.float32 or x.is_cuda:
            return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)
        return self.weight * F.rms_norm(x.float(), (x.shape[-1],), None, self.eps).to(x.dtype)


class ProjectionNorm(torch.nn.Module):
    """RMS norm of all heads of the query or key projection together, of which each tensor rank holds its own.

    The sum of squares is taken over the tensor ranks; so is its gradient, because every rank's output depends on it. The weight
    is cut like the projection's rows and so no replicated norm: ``qk_layernorm`` of the TransformerConfig, by which megatron-core
    sums the gradients of query and key norms over tensor ranks, has to be off.

    Args:
        config, hidden_size, eps: as megatron-core hands them to a query or key norm; hidden_size is that of one head.
        heads: heads of the whole projection.

    Raises:
        UserError: when the tensor ranks cannot share the heads out.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float, heads: int):
        super().__init__()
        if heads % config.tensor_model_parallel_size:
            raise UserError(
                f"parallel.tensor = {config.tensor_model_parallel_size} does not divide {heads} normed heads; choose a divisor"
            )
        self.size, self.eps = heads * hidden_size, eps
        share = self.size // config.tensor_model_parallel_size
        self.weight = torch.nn.Parameter(torch.ones(share, dtype=config.params_dtype, device=torch.cuda.current_device()))
        set_tensor_model_parallel_attributes(self.weight, is_parallel=True, dim=0, stride=1)

    def forward(self, x: Tensor) -> Tensor:
        """Normalises over all heads of all tensor ranks.

        Args:
            x: [T, 1, heads / TP, head_dim].

        Returns:
            the same shape and type.
        """
        channels = x.flatten(-2).float()
        squares = reduce_from_tensor_model_parallel_region(channels.pow(2).sum(-1, keepdim=True))
        squares = copy_to_tensor_model_parallel_region(squares)
        normed = self.weight * (channels * torch.rsqrt(squares / self.size + self.eps))
        return normed.to(x.dtype).view(x.shape)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """megatron-core's description of the weight for distributed checkpoints: cut along its only axis."""
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True), prefix, {"weight": 0}, sharded_offsets
        )


class AddNormed(torch.nn.Module):
    """``residual + norm(branch)``, in the place of a layer where megatron-core adds a branch to the residual.

    Args:
        config: the model's.
        norm: class of the norm, built as megatron-core builds one.
    """

    def __init__(self, config: TransformerConfig, norm: type):
        super().__init__()
        self.norm = norm(config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon)

    def forward(self, training: bool, fused: bool):
        """megatron-core asks for the function first."""

        def add(branch_and_bias: tuple[Tensor, Tensor | None], residual: Tensor, dropout: float) -> Tensor:
            branch, _no_bias = branch_and_bias
            return residual + F.dropout(self.norm(branch), dropout, training)

        return add
