"""What stands in for `transformer_engine_torch`, the compiled half of Transformer Engine, on a CPU: its functions with their
arguments, written with torch. The other half, modules and autograd functions in Python, is Transformer Engine's own.

Signatures and checks are of release 2.11 (pybind.cpp and the files next to it), on Hopper.
"""

from __future__ import annotations

import functools
from enum import IntEnum

import torch
from torch import Tensor

DType = IntEnum(
    "DType",
    "kByte kInt16 kInt32 kInt64 kFloat32 kFloat16 kBFloat16 kFloat8E4M3 kFloat8E5M2 kFloat8E8M0 kFloat4E2M1",
    start=0,
)
FP8FwdTensors = IntEnum(
    "FP8FwdTensors", [f"GEMM{n}_{what}" for n in (1, 2, 3) for what in ("INPUT", "WEIGHT", "OUTPUT")], start=0
)
FP8BwdTensors = IntEnum("FP8BwdTensors", [f"GRAD_{what}{n}" for n in (1, 2, 3) for what in ("OUTPUT", "INPUT")], start=0)
Float8BlockScaleTensorFormat = IntEnum("Float8BlockScaleTensorFormat", "GEMM_READY COMPACT", start=0)


def _numbered(kind: str, names: str) -> type[IntEnum]:
    return IntEnum(kind, [f"NVTE_{name}" for name in names.split()], start=0)


NVTE_Bias_Type = _numbered("NVTE_Bias_Type", "NO_BIAS PRE_SCALE_BIAS POST_SCALE_BIAS ALIBI")
NVTE_Mask_Type = _numbered(
    "NVTE_Mask_Type",
    "NO_MASK PADDING_MASK CAUSAL_MASK PADDING_CAUSAL_MASK CAUSAL_BOTTOM_RIGHT_MASK PADDING_CAUSAL_BOTTOM_RIGHT_MASK",
)
NVTE_Softmax_Type = _numbered("NVTE_Softmax_Type", "VANILLA_SOFTMAX OFF_BY_ONE_SOFTMAX LEARNABLE_SOFTMAX")
NVTE_QKV_Format = _numbered("NVTE_QKV_Format", "BSHD SBHD THD SBHD_2BSHD BSHD_2SBHD THD_2BSHD THD_2SBHD")
NVTE_QKV_Layout = _numbered(
    "NVTE_QKV_Layout",
    "SB3HD SBH3D SBHD_SB2HD SBHD_SBH2D SBHD_SBHD_SBHD BS3HD BSH3D BSHD_BS2HD BSHD_BSH2D BSHD_BSHD_BSHD T3HD TH3D THD_T2HD "
    "THD_TH2D THD_THD_THD SBHD_BSHD_BSHD BSHD_SBHD_SBHD THD_BSHD_BSHD THD_SBHD_SBHD Paged_KV_BSHD_BSHD_BSHD "
    "Paged_KV_BSHD_SBHD_SBHD Paged_KV_SBHD_BSHD_BSHD Paged_KV_SBHD_SBHD_SBHD Paged_KV_THD_BSHD_BSHD Paged_KV_THD_SBHD_SBHD",
)
NVTE_Fused_Attn_Backend = _numbered("NVTE_Fused_Attn_Backend", "F16_max512_seqlen F16_arbitrary_seqlen FP8 No_Backend")
CommOverlapType = IntEnum("CommOverlapType", "RS AG", start=0)


class CommOverlap: ...


class CommOverlapP2P: ...


class CommOverlapHelper: ...


from tests.standins.transformer_engine.attention import *  # noqa: E402, F403  all of them, for Transformer Engine to find here
from tests.standins.transformer_engine.optimizer import *  # noqa: E402, F403
from tests.standins.transformer_engine.quantized import *  # noqa: E402, F403
from tests.standins.transformer_engine.quantized import factor, quantize  # noqa: E402

TORCH = {
    DType.kByte: torch.uint8,
    DType.kInt32: torch.int32,
    DType.kFloat32: torch.float32,
    DType.kFloat16: torch.float16,
    DType.kBFloat16: torch.bfloat16,
    DType.kFloat8E4M3: torch.float8_e4m3fn,
    DType.kFloat8E5M2: torch.float8_e5m2,
}


def __getattr__(name: str):
    if name.startswith("__"):
        raise AttributeError(name)
    return _missing(name)


@functools.cache
def _missing(name: str):
    def call(*_args, **_options):
        raise NotImplementedError(f"{name} of transformer_engine_torch has no stand-in")

    return call


layernorm_fwd, layernorm_bwd = _missing("layernorm_fwd"), _missing("layernorm_bwd")
"""taken from here by a star, which finds only what is there"""


def get_cudnn_version() -> int:
    return 91500


def generic_gemm(
    A, transA, B, transB, D, quantizer, output_dtype, bias, bias_type, gelu, gelu_in, grad, workspace, workspace_size,
    accumulate, use_split_accumulator, comm_overlap=None, comm_type=None, extra_output=None, bulk_overlap=False, alpha=1.0,
    beta=None,
):  # fmt: skip
    """``op(B) @ op(A)`` in row-major order, which cuBLAS sees as a product of column-major factors."""
    assert comm_overlap is None and not gelu
    a, b = factor(A, transA), factor(B, not transB)  # both with the summed dimension last
    assert a.shape[1] == b.shape[1], f"{tuple(a.shape)} and {tuple(b.shape)}"
    leading = () if transB else tuple(B.size())[:-1]
    out = (b.float() @ a.float().t()).mul_(alpha)
    if bias is not None and not grad:
        out += bias.float()
    bias_grad = None
    if bias is not None and grad:
        bias_grad = b.float().sum(1).to(bias.dtype)
    dtype = TORCH[output_dtype] if output_dtype is not None else A.dtype
    if D is None:
        made = out.to(dtype).view(*leading, -1) if leading else out.to(dtype)
        return [made if quantizer is None else quantize(made, quantizer), bias_grad, None, extra_output]
    assert D.is_contiguous() and (output_dtype is None or D.dtype == dtype)
    target = D.view(out.shape)
    target.copy_(out + (1.0 if beta is None else beta) * target.float() if accumulate else out)
    return [D, bias_grad, None, extra_output]


def rmsnorm_fwd(input, weight, eps, ln_out, quantizer, otype, sm_margin, zero_centered_gamma):
    rows = input.reshape(-1, input.shape[-1]).float()
    rsigma = torch.rsqrt(rows.pow(2).mean(-1) + eps)
    normed = (rows * rsigma[:, None] * _gamma(weight, zero_centered_gamma)).to(TORCH[otype]).view(input.shape)
    if quantizer is not None:
        normed = quantize(normed, quantizer, ln_out)
    elif ln_out is not None:
        normed = ln_out.copy_(normed)
    return [normed, None, rsigma]


def rmsnorm_bwd(dz, x, rsigma, gamma, sm_margin, zero_centered_gamma):
    rows, up = x.reshape(-1, x.shape[-1]).float(), dz.reshape(-1, x.shape[-1]).float()
    normed = rows * rsigma[:, None]
    inner = up * _gamma(gamma, zero_centered_gamma)
    dx = (inner - normed * (inner * normed).mean(-1, keepdim=True)) * rsigma[:, None]
    return [dx.to(x.dtype).view(x.shape), (up * normed).sum(0).to(gamma.dtype)]


def _gamma(weight: Tensor, zero_centered: bool) -> Tensor:
    return weight.float() + 1.0 if zero_centered else weight.float()
