"""Which tensors a layer keeps from its forward pass for its backward pass, each with the source that keeps it.

One table for who builds the layers and who plans their memory: tests hold it against what the layers themselves give autograd to
keep. Lines of Transformer Engine are of its Python files at v2.11, `te/` being transformer_engine/pytorch/.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Spec = Literal["te", "local"]


@dataclass(frozen=True)
class Extents:
    """Of a layer, as far as a rank holds it: elements of a token."""

    hidden: float
    """of the residual stream: divided by the tensor ranks under sequence parallelism"""
    whole_hidden: float
    """of the residual stream without that division"""
    queries: float
    keys: float
    """of keys, and as many of values"""
    ffn: float
    heads: float
    """heads of queries"""
    key_heads: float
    head: float
    """channels of a head"""


@dataclass(frozen=True)
class Kept:
    """A tensor that is kept until the backward pass."""

    module: str
    """that keeps it, as megatron-core's layer calls it"""
    tensor: str
    elements: Callable[[Extents], float]
    """of a token"""
    source: str
    """the line that saves it"""
    bytes: Literal["activation", "product", 4] = "activation"
    """of an element: the activations' type; that of a product's operand, which FP8 makes one; or float32"""
    let_go: frozenset[str] = frozenset()
    """modules of `model.recompute` with any of which it is not kept"""
    when: Literal["always", "head norms", "no fused rope", "no fused activation", "norms after"] = "always"


_MLP = frozenset({"mlp"})
_ACTIVATION = frozenset({"mlp", "activation"})
_NORM = frozenset({"layernorm"})
_CORE = frozenset({"core_attn"})
