"""How many rows of each source, and which: Tulu's ``{name: amount}``."""

from __future__ import annotations

from math import floor

import numpy as np

from tulu_mega.errors import UserError

Amount = int | float
"""A whole number counts rows; a number with a point is a share of the source: 0.5 half of it, 3.0 three times all of it."""


def draw(rows: int, amount: Amount, seed: int, name: str) -> np.ndarray:
    """Which rows of a source are drawn.

    The whole source as often as it goes into the amount, then distinct rows for what is left, each part in the source's order.
    Which rows are left depends on ``rows``, ``amount`` and ``seed`` alone: not on the source's name or place in the mixture.

    Args:
        rows: rows of the source, at least 1.
        amount: how many.
        seed: of the draw.
        name: the source, for messages.

    Returns:
        int64, row numbers counted from 0.

    Raises:
        UserError: a count of more rows than there are, or a share of less than one row.
    """
    if isinstance(amount, int):
        if amount > rows:
            raise UserError(
                f"{name}: data.train asks for {amount} rows, it has {rows}; "
                f"write {amount / rows:.4g} with a point to repeat rows, or at most {rows}"
            )
        count = amount
    else:
        count = floor(amount * rows + 1e-6)  # 0.1 of 30 rows is 3.0000000000000004, 0.29 of 100 is 28.999999999999996
        if not count:
            raise UserError(
                f"{name}: data.train asks for {amount} of {rows} rows, which is less than one; raise it or leave it out"
            )
    times, rest = divmod(count, rows)
    # RandomState, whose streams NumPy keeps for good
    left = np.sort(np.random.RandomState(seed % 2**32).permutation(rows)[:rest])
    return np.concatenate([np.tile(np.arange(rows), times), left]).astype(np.int64)
