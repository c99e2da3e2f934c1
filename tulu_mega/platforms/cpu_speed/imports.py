"""An import of megatron-core without parts that take seconds to import and are not used here."""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Callable

import torch

from tulu_mega.process import plain, uncollected


def import_megatron() -> None:
    """Imports megatron-core; call it before anything else does. Does nothing where megatron-core is not installed. wandb is
    hidden from megatron-core, whose own inference engine alone reports to it (0.8 s of CPU). Where torch has no CUDA, the
    functions
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
    """Return the function unchanged. Stands in for `torch.compile`, called or as a decorator."""
    return _as_it_is if function is None else function
