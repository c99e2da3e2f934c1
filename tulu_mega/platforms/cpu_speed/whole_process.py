"""The parts of this package that concern a process as a whole."""

from __future__ import annotations

from tulu_mega.platforms.cpu_speed import groups_of_one, matmul
from tulu_mega.process import plain


def install() -> None:
    """Bounds oneDNN's caches and spares single ranks their collectives; nothing under TULU_MEGA_PLAIN=1."""
    if not plain():
        matmul.bound_caches()
        groups_of_one.install()
