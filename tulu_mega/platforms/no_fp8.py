"""What megatron-core asks of Transformer Engine when it computes a norm again, where there is no Transformer Engine.

Its transformer layer hands its checkpoints ``fp8=False``, which they take for a yes (they compare with None), and they then look
for names that only an import of Transformer Engine brings. Without it nothing is in FP8, and that is what they are told.
"""

from __future__ import annotations

import contextlib
import importlib


class NoFp8:
    """In the place of Transformer Engine's FP8GlobalStateManager."""

    @staticmethod
    def is_fp8_enabled() -> bool:
        """No."""
        return False


def nothing_around(**_options) -> contextlib.AbstractContextManager[None]:
    """In the place of Transformer Engine's contexts of FP8 and of recomputation."""
    return contextlib.nullcontext()


def install() -> None:
    """Gives megatron-core these names where it has not found Transformer Engine's."""
    random = importlib.import_module("megatron.core.tensor_parallel.random")
    if not random.HAVE_TE:
        random.FP8GlobalStateManager = NoFp8
        random.activation_recompute_forward = random.fp8_autocast = nothing_around
