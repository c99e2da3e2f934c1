"""Rotary embeddings (Su et al., arXiv 2104.09864) as the model's config scales them, one for all layers or one for each kind."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.distributed import ProcessGroup
from transformers import PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from tulu_mega.bridge.families.decoder import ROPE_TYPES
from tulu_mega.errors import UserError
from tulu_mega.model.hf_config import head_dim, layer_needs
from tulu_mega.model.packed import PlacedSeqParams


@dataclass(frozen=True)
class Rope:
    """One rotary embedding."""

    frequencies: Tensor
    """inverse frequencies, float32 [head_dim / 2]"""
    attention_scaling: float
    """factor of queries and of keys: 1, but under YaRN (Peng et al., arXiv 2309.00071)"""

    def softmax_scale(self) -> float | None:
        """Scale of attention's scores that has the same effect; None for the usual 1 / sqrt(head_dim)."""
        head = 2 * len(self.frequencies)
        return None if self.attention_scaling == 1.0 else self.attention_scaling**2 / head**0.5


@dataclass(frozen=True)
class Ropes:
    """The rotary embeddings of a model and which layer has which."""

    kinds: tuple[Rope, ...]
    of_layer: tuple[int, ...]
    """for each layer, the index of its entry in `kinds`"""

    @property
    def frequencies(self) -> Tensor:
        """Inverse frequencies of all kinds end to end, [kinds * head_dim / 2]: what megatron-core's rotary module is given."""
        return torch.cat([kind.frequencies for kind in self.kinds])


def ropes(config: PretrainedConfig) -> Ropes:
    """The rotary embeddings that a model's config asks for.

    Raises:
        UserError: for a scaling that is not known here.
    """
    by_layer = layer_needs(config).ropes
    if not by_layer:
        return Ropes((_rope(config, None),), (0,) * config.num_hidden_layers)
    names = sorted(set(by_layer))
    return Ropes(tuple(_rope(config, name) for name in names), tuple(names.index(name) for name in by_layer))


def _rope(config: PretrainedConfig, name: str | None) -> Rope:
    parameters = config.rope_parameters[name] if name else config.rope_parameters
    kind, size = parameters["rope_type"], head_dim(config)
    if parameters.get("partial_rotary_factor") not in (None, 1, 1.0):
        raise UserError(f"partial_rotary_factor = {parameters['partial_rotary_factor']} of the model's config is not supported")
    if kind == "default":
        exponents = torch.arange(0, size, 2, dtype=torch.int64).float() / size
        return Rope(1.0 / (parameters["rope_theta"] ** exponents), 1.0)
    if kind not in ROPE_TYPES:
        raise UserError(f"rope_type {kind!r} of the model's config is not supported; supported: {', '.join(ROPE_TYPES)}")
    frequencies, scaling = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"), **({"layer_type": name} if name else {}))
    return Rope(frequencies, float(scaling))


class PlacedRotary(RotaryEmbedding):
    """megatron-core's rotary embedding, with angles for every token of a `PlacedSeqParams` pack.

    megatron-core takes as many angles as a pack has tokens for the tokens' own (its "exact mapping"), fewer for those of
    positions that begin anew in every segment. It knows Llama 3's scaling with its published constants only, and one embedding
    for all layers: so frequencies are given.

    Args:
        frequencies: `Ropes.frequencies`, on the model's device.
        config: the model's.
        context_group: the ranks that share a pack's tokens.
    """

    def __init__(self, frequencies: Tensor, config: TransformerConfig, context_group: ProcessGroup):
        super().__init__(
            kv_channels=config.kv_channels,
            rotary_percent=1.0,
            rotary_interleaved=config.rotary_interleaved,
            use_cpu_initialization=config.use_cpu_initialization,
            cp_group=context_group,
        )
        self.inv_freq = frequencies
        self._positions_T: Tensor | None = None

    def get_rotary_seq_len(self, *args, **kwargs) -> int:
        """As RotaryEmbedding's, which GPTModel calls before every pass; the pack's positions are kept for it."""
        packed: PlacedSeqParams = args[4] if len(args) > 4 else kwargs["packed_seq_params"]
        self._positions_T = packed.positions_T
        return super().get_rotary_seq_len(*args, **kwargs)

    def forward(self, max_seq_len: int, *args, **kwargs) -> Tensor:
        """[T, 1, 1, head_dim] of the whole pack's tokens."""
        return super().forward(max_seq_len, *args, **kwargs).index_select(0, self._positions_T)


class OwnRopeAttention(SelfAttention):
    """Self-attention that picks its layer's rotary embedding from those of all kinds.

    Args:
        ropes: the model's.
        The rest is SelfAttention's.
    """

    def __init__(self, config: TransformerConfig, submodules, layer_number: int, *args, ropes: Ropes, **kwargs):
        self.kind = ropes.of_layer[layer_number - 1]
        own = copy.copy(config)
        own.softmax_scale = ropes.kinds[self.kind].softmax_scale()
        super().__init__(own, submodules, layer_number, *args, **kwargs)

    def forward(self, hidden_states: Tensor, *args, rotary_pos_emb: Tensor, **kwargs):
        """As SelfAttention's, but rotary_pos_emb has the angles of `Ropes.frequencies`: [positions, 1, 1, kinds * head_dim]."""
        half = self.config.kv_channels // 2
        angles = rotary_pos_emb[..., self.kind * half : (self.kind + 1) * half]
        return super().forward(hidden_states, *args, rotary_pos_emb=torch.cat((angles, angles), dim=-1), **kwargs)
