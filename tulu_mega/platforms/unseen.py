"""GPUs of this machine that torch does not see: the same commands run on CPUs, where nobody may want them to."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from tulu_mega.outside.versions import of_package


def unseen_gpus() -> list[str]:
    """Return a warning where this machine has GPUs and torch sees none; an empty list where they are hidden on purpose."""
    import torch

    devices = sorted(str(path) for path in Path("/dev").glob("nvidia[0-9]*"))
    if not devices or torch.cuda.is_available():
        return []
    return told(devices, os.environ.get("CUDA_VISIBLE_DEVICES"), torch.version.cuda, of_package("torch") or "")


def told(devices: Sequence[str], shown: str | None, cuda: str | None, torch: str) -> list[str]:
    """Describe GPUs that torch does not see.

    Args:
        devices: their files.
        shown: CUDA_VISIBLE_DEVICES.
        cuda: that torch was built with; None for a CPU build.
        torch: its version.
    """
    if shown is not None and shown.strip() in ("", "-1"):
        return []
    if cuda is None:
        why = f"torch {torch} was built without CUDA; install a build with it"
    else:
        why = (
            f"torch {torch} was built with CUDA {cuda} and sees none of them; look at nvidia-smi: the driver may be older, or "
            "CUDA_VISIBLE_DEVICES may name others"
        )
    hide = "CUDA_VISIBLE_DEVICES='' asks for CPUs"
    return [f"this machine has {len(devices)} GPU(s), and everything is computed on CPUs: {why} ({hide})"]
