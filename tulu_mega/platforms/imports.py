"""How megatron-core is imported."""

from __future__ import annotations

import logging
import warnings

from tulu_mega.platforms import releases
from tulu_mega.platforms.cpu_speed.imports import import_megatron


def prepare_imports() -> None:
    """Imports megatron-core, quietly and fast. Call it before anything else does; it may be called again.

    megatron-core warns, when it is imported, of every package it could also use, and calls functions that torch will rename:
    a user of this project can act on none of that. Where it is not installed nothing is imported.

    Raises:
        UserError: packages are installed that are known not to work.
    """
    releases.refuse("training")
    warnings.filterwarnings("ignore", module=r"megatron\.")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.")
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)
    logging.getLogger("megatron").setLevel(logging.ERROR)
    import_megatron()
