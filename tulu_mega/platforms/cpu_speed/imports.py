"""megatron-core without what takes seconds to import and serves nothing here."""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Callable

import torch

from tulu_mega.process import plain, uncollected


def import_megatron() -> None:
    """Imports megatron-core; call it before anything else does. Nothing, where it is not installed.

    It finds no wandb, which only its own inference engine would report to (0.8 s of CPU). Where torch has no CUDA, the functions
    that it hands to `torch.compile` as it is imported are left as they are (2 s): the layers built there call none of them unless
    asked to.
    """
    if "megatron.core" in sys.modules:
        return
    with contextlib.ExitStack() as stack:
        stack.enter_context(uncollected())
        if "wandb" not in sys.modules and not plain():
            sys.modules["wandb"] = None
            stack.callback(sys.modules.pop, "wandb")
        if not torch.cuda.is_available() and not plain():
            compiler, torch.compile = torch.compile, _as_it_is
            stack.callback(setattr, torch, "compile", compiler)
        with contextlib.suppress(ModuleNotFoundError):
            importlib.import_module("megatron.core")


def _as_it_is(function: Callable | None = None, **_options) -> Callable:
    """In the place of `torch.compile`, called or as a decorator."""
    return _as_it_is if function is None else function
