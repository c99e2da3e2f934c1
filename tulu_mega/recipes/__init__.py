"""Stages, each readable as its method.

megatron-core warns, when it is imported, of every package it could also use, and calls functions that torch will rename: nothing
a user of this project can act on. Recipes are what imports it, so the filters are set here, before; and it is imported here, so
that it is without what takes seconds.
"""

import logging
import warnings

from tulu_mega.platforms.lean import import_megatron

warnings.filterwarnings("ignore", module=r"megatron\.")
warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)
logging.getLogger("megatron").setLevel(logging.ERROR)
import_megatron()
