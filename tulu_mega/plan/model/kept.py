"""What a layer keeps of a token between its forward and its backward pass, tensor by tensor.

h hidden   f feed-forward   q, k channels of queries, keys   d of a head   n query heads   g key heads   t tensor parallel size
b bytes of an activation (bf16: 2)   c bytes of a product's operand (FP8: 1, else b)   s what shares out the tokens (t under
sequence parallelism, else 1)

The sources, by function: Transformer Engine 2.11, pytorch: `_LayerNormLinear.forward` (module/layernorm_linear.py) saves its
input, the normed input as this rank has it and one float32 of statistics, `_Linear.forward` (module/linear.py) its input,
`FusedAttnFunc.forward` (attention/dot_product_attention/backends.py) queries, keys, values, its result and one float32 a head;
`get_qkv_layout` (…/utils.py) makes keys and values contiguous first, since values are a piece of the projection's result and
rotated keys are not. `FusedRoPEFunc` (attention/rope.py) saves angles alone. megatron-core 0.16.1: `SwiGLUFunction`
(fusions/fused_bias_swiglu.py) saves its input; `MLP.forward` without fusion (transformer/mlp.py) makes the gate's activation and
a copy of the other half beside, which the product saves; `_apply_rotary_pos_emb_bshd` (models/common/embeddings/rope_utils.py)
cosines and sines for each of queries and keys. What two functions save is one tensor, and is counted once.
"""

from __future__ import annotations

from dataclasses import dataclass

from tulu_mega.plan.model.job import Job


@dataclass(frozen=True)
class Kept:
    """One tensor, or several of a kind."""

    what: str
    formula: str
    """bytes of a token in the letters above"""
    bytes: float
    """of a token on this rank, before context parallelism"""
    module: str = ""
    """the part of a layer whose recomputation makes it unnecessary; "" for none but the whole layer's"""


def layer_kept(job: Job) -> tuple[Kept, ...]:
    """What a layer keeps where nothing is recomputed."""
    size, kernels, t = job.size, job.kernels, job.parallel.tensor
    b, s = job.itemsize, t if job.sequence else 1
    c = 1 if job.fp8 else b
    h, f, q, k = size.hidden, size.ffn, size.queries, size.keys
    d, n, g = size.queries / size.heads, size.heads, size.heads * size.keys / size.queries
    value = k
    if size.needs.norms == "after":
        kept = [
            Kept("layer's input", "c h / s", c * h / s),
            Kept("attention's result before its norm", "b h / s", b * h / s),
            Kept("residual between", "c h / s", c * h / s),
            Kept("feed-forward's result before its norm", "b h / s", b * h / s),
            Kept("statistics of two norms", "8 / s", 8 / s),
        ]
    else:
        apart = not kernels.transformer_engine or "layernorm" in job.recompute.modules or job.lora is not None
        second = "layernorm" if apart else "layernorm mlp"
        kept = [
            Kept("layer's input", "b h / s", b * h / s),
            Kept("normed input of attention", "c h / s", c * h / s, "layernorm"),
            Kept("residual between", "b h / s", b * h / s),
            # the input of a feed-forward that is computed again is kept, be it the residual or, where norms are apart, this
            Kept("normed input of feed-forward", "c h / s", c * h / s, second),
            Kept("statistics of attention's norm", "4 / s", 4 / s, "layernorm"),
            Kept("statistics of feed-forward's norm", "4 / s", 4 / s, second),
        ]
    match size.needs.qk_norm:
        case "head":
            kept += [
                Kept("queries and keys before their norms", "b (q + k) / t", b * (q + k) / t),
                Kept("statistics of their norms", "4 (n + g) / t", 4 * (n + g) / t),
            ]
        case "projection":  # our own norm, in float32: the operands of both of its products
            kept += [
                Kept("queries and keys before and within their norms", "8 (q + k) / t", 8 * (q + k) / t),
                Kept("statistics of their norms", "8", 8),
            ]
    if not kernels.rope:
        kept += [Kept("cosines and sines for queries and keys", "4 b d", 4 * b * d)]
    if kernels.own_attention or "core_attn" in job.recompute.modules:  # a checkpoint keeps the values as it is handed them
        value = q + 2 * k
        kept += [Kept("values, within the projection's result", "b (q + 2 k) / t", b * value / t)]
    else:
        kept += [Kept("values", "b k / t", b * value / t)]
    kept += [
        Kept("rotated queries and keys", "b (q + k) / t", b * (q + k) / t),
        Kept("attention's result", "b q / t", b * q / t),
        Kept("attention's softmax", "4 n / t", 4 * n / t, "core_attn"),
        Kept("gate and up", "2 b f / t", 2 * b * f / t, "mlp"),
    ]
    if not kernels.activation:
        kept += [Kept("gate's activation, and up once more", "2 b f / t", 2 * b * f / t, "activation mlp")]
    kept += [Kept("their product", "c f / t", c * f / t, "activation mlp")]
    if job.lora:
        what, formula = "adapters' narrow products", "b r for each (row-parallel: / s)"
        if job.lora.dora:
            what, formula = f"{what}, and what their lengths scale", f"{formula}, b o"
        kept += [Kept(what, formula, job.adapter_work.kept)]
    return tuple(kept)


def token_bytes(job: Job) -> tuple[float, float, float]:
    """Bytes of a token that a layer keeps over context parallelism: of which modules are computed again as the job says; of
    which nothing is; which is computed again whole, its input."""
    kept, own = layer_kept(job), job.parallel.tensor if job.sequence else 1
    everything = sum(each.bytes for each in kept)
    left = sum(each.bytes for each in kept if not job.recompute.modules & set(each.module.split()))
    return tuple(each / job.parallel.context for each in (left, everything, job.itemsize * job.size.hidden / own))
