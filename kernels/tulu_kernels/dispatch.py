"""The one rule that says whether a Triton kernel or its torch reference runs."""

from __future__ import annotations

import functools
import importlib.util
import logging
from typing import Literal

import torch

Backend = Literal["auto", "triton", "torch"]

_log = logging.getLogger(__name__)


def chosen(kernel: str, device: torch.device, asked: Backend = "auto") -> Literal["triton", "torch"]:
    """Triton on CUDA devices where it can be imported, torch elsewhere, unless one of them is asked for. Logged once a kernel.

    Args:
        kernel: its name, for the log.
        device: where its tensors are.
        asked: ``triton`` on a CPU is right under Triton's interpreter only.

    Raises:
        ValueError: Triton is asked for and not installed.
    """
    return _chosen(kernel, device.type, asked)


@functools.cache
def _chosen(kernel: str, device: str, asked: Backend) -> Literal["triton", "torch"]:
    importable = importlib.util.find_spec("triton") is not None
    if asked == "triton" and not importable:
        raise ValueError(f"{kernel}: Triton is asked for and cannot be imported; install triton, or ask for torch")
    if asked != "auto":
        choice, why = asked, "asked for"
    elif device != "cuda":
        choice, why = "torch", f"on {device}"
    elif not importable:
        choice, why = "torch", "triton is not installed"
    else:
        choice, why = "triton", "on cuda"
    _log.info("%s: %s (%s)", kernel, choice, why)
    return choice
