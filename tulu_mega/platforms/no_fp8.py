"""Names of Transformer Engine that megatron-core needs when it computes a norm again, for where it is not installed.

Its transformer layer hands its checkpoints ``fp8=False``, which they take for a yes (they compare with None), and they then look
for names that only an import of Transformer Engine brings. Without Transformer Engine nothing is in FP8, and the stand-ins say
so.
"""

from __future__ import annotations

import contextlib
import importlib


class NoFp8:
    """Stands in for Transformer Engine's FP8GlobalStateManager."""

    @staticmethod
    def is_fp8_enabled() -> bool:
        """Return False."""
        return False


def nothing_around(**_options) -> contextlib.AbstractContextManager[None]:
    """Return an empty context, for Transformer Engine's contexts of FP8 and of recomputation."""
    return contextlib.nullcontext()


def install() -> None:
    """Define these names in megatron-core where it has not found Transformer Engine's."""
    random = importlib.import_module("megatron.core.tensor_parallel.random")
    if not random.HAVE_TE:
        random.FP8GlobalStateManager = NoFp8
        random.activation_recompute_forward = random.fp8_autocast = nothing_around
