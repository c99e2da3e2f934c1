"""Layer parts of the local spec: what megatron-core's own lack for packed sequences and sequence parallelism without TE."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


class RMSNorm(torch.nn.Module):
    """Root-mean-square norm (Zhang and Sennrich, arXiv 1910.07467) whose weight takes part in sequence parallelism.

    Statistics are float32 whatever the activations are, as Hugging Face's Llama has it.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_unused):
        super().__init__()
        device = torch.cuda.current_device()
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype, device=device))
        self.weight.sequence_parallel = config.sequence_parallel  # megatron-core then sums its gradient over TP
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalises the last dimension."""
        if x.dtype == torch.float32:
            return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)
        return self.weight * F.rms_norm(x.float(), (x.shape[-1],), None, self.eps).to(x.dtype)


class PackedAttention(torch.nn.Module):
    """Causal grouped-query attention within each segment of a packed row, by torch's SDPA."""

    def __init__(self, config: TransformerConfig, layer_number: int, attn_mask_type, attention_type: str, **_unused):
        super().__init__()

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type=None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """
        Args:
            query: [T, heads, head_dim].
            key, value: [T, key-value heads, head_dim].
            packed_seq_params: segment boundaries (``cu_seqlens_q``).

        Returns:
            [T, 1, heads * head_dim].
        """
        bounds = packed_seq_params.cu_seqlens_q.tolist()
        lengths = [end - start for start, end in zip(bounds, bounds[1:], strict=False)]
        outputs = []
        for q, k, v in zip(query.split(lengths), key.split(lengths), value.split(lengths), strict=True):
            heads_first = [x.transpose(0, 1).unsqueeze(0) for x in (q, k, v)]
            outputs.append(F.scaled_dot_product_attention(*heads_first, is_causal=True, enable_gqa=True)[0].transpose(0, 1))
        return torch.cat(outputs).reshape(query.shape[0], 1, -1)
