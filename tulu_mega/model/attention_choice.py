"""The choice of attention: Transformer Engine's, FlashAttention's, torch's for packed sequences, or torch's SDPA."""

from __future__ import annotations

import functools
import importlib.util
import inspect
import logging
from dataclasses import dataclass
from typing import Literal

import torch

from tulu_mega.errors import UserError

Attention = Literal["te", "flash3", "flash2", "varlen", "sdpa"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Situation:
    """The facts that decide the choice."""

    device: str
    """type of the device, ``cuda`` or another"""
    capability: tuple[int, int] | None
    """CUDA's compute capability; None elsewhere"""
    dtype: torch.dtype
    """type of queries, keys and values"""
    head_dim: int
    windowed: bool
    """whether some layers see a window only"""
    context: int
    """context parallel size"""
    te_layers: bool
    """whether the layers are Transformer Engine's"""
    installed: frozenset[Attention]
    """those of ``flash3``, ``flash2`` and ``varlen`` (in a torch that supports windows) that are installed"""
    shares: bool = False
    """whether sequences should share prefixes within a pack if the attention supports it"""


def choose_attention(situation: Situation, asked: Attention | Literal["auto"] = "auto") -> Attention:
    """The fastest attention that can do what is needed. Logged with its reason, once a situation.

    Transformer Engine picks between cuDNN and FlashAttention itself; it is passed over where layers have windows under context
    parallelism, for which it exchanges keys in a way (`cp_comm_type`) that packed sequences need not have. It does not support
    shared prefixes, so the others are preferred where sequences should share them. ``sdpa`` runs everywhere, segment by
    segment.

    Args:
        asked: the attention that the settings name, or ``auto``.

    Raises:
        UserError: the one asked for cannot do it; says why.
    """
    return _choose(situation, asked)


@functools.cache
def _choose(situation: Situation, asked: Attention | Literal["auto"]) -> Attention:
    if asked != "auto":
        if obstacle := _obstacle(asked, situation):
            raise UserError(f"model.attention = {asked!r}: {obstacle}; choose another or set it to 'auto'")
        _log.info("attention: %s (asked for)", asked)
        return asked
    order, passed = list(_ORDER), []
    if situation.shares and situation.context == 1:
        order.append(order.pop(0))
        passed.append("sequences share prefixes, which Transformer Engine's attention does not support")
    for kind in order:
        obstacle = _obstacle(kind, situation)
        if obstacle is None:
            _log.info("attention: %s%s", kind, f" ({'; '.join(passed)})" if passed else "")
            return kind
        if obstacle not in passed:
            passed.append(obstacle)
    _log.info("attention: sdpa (%s)", "; ".join(passed))
    return "sdpa"


def _obstacle(kind: Attention, situation: Situation) -> str | None:
    """Return why this attention cannot be used; None where it can."""
    if kind == "sdpa":
        return None
    if situation.device != "cuda":
        return f"on {situation.device}"
    if situation.dtype not in (torch.bfloat16, torch.float16):
        return f"{str(situation.dtype).removeprefix('torch.')}: fused attention takes 16 bits"
    if situation.capability < (8, 0):
        return f"compute capability {_version(situation.capability)} is below 8.0"
    if situation.head_dim % 8 or situation.head_dim > 256:
        return f"heads of {situation.head_dim} channels: expected a multiple of 8 up to 256"
    if kind == "te":
        if not situation.te_layers:
            return "layers are not Transformer Engine's"
        return "windows under context parallelism" if situation.windowed and situation.context > 1 else None
    if kind == "flash3" and situation.capability[0] != 9:
        return f"FlashAttention 3 wants compute capability 9.x, not {_version(situation.capability)}"
    return None if kind in situation.installed else f"{_NAMES[kind]} is not installed"


_ORDER: tuple[Attention, ...] = ("te", "flash3", "flash2", "varlen")
"""The fastest first."""
_NAMES = {"flash3": "FlashAttention 3", "flash2": "FlashAttention 2", "varlen": "a torch with varlen_attn of windows"}


def _version(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))


def situation(
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    windowed: bool,
    context: int,
    te_layers: bool,
    shares: bool = False,
) -> Situation:
    """This process's situation: what the device can do, and what is installed, is looked up."""
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    installed = _installed() if device.type == "cuda" else frozenset()
    return Situation(device.type, capability, dtype, head_dim, windowed, context, te_layers, installed, shares)


@functools.cache
def _installed() -> frozenset[Attention]:
    """Find the installed kinds without importing FlashAttention."""
    found: set[Attention] = {
        kind
        for kind, module in (("flash3", "flash_attn_interface"), ("flash2", "flash_attn"))
        if importlib.util.find_spec(module) is not None
    }
    if importlib.util.find_spec("torch.nn.attention.varlen") is not None:
        from torch.nn.attention.varlen import varlen_attn

        if "window_size" in inspect.signature(varlen_attn).parameters:
            found.add("varlen")
    return frozenset(found)
