"""What tasks of programs have in common: the program of a response, in the form that the verifier reads."""

from __future__ import annotations

import re
from collections.abc import Sequence

VERIFIER = "python_code"
"""of `rewards`: statements run against the program in a sandbox"""
FENCE = "```"
_TICKS = re.compile(r"`{3,}")


def continued(begin: str, response: str, stops: Sequence[str] = ()) -> str:
    """The program that begins with a text which the response goes on with.

    Args:
        begin: of the program.
        response: goes on with it; ends at the fence, which the prompt has opened.
        stops: texts at which it ends before.
    """
    ends = [at for stop in (*stops, FENCE) if (at := response.find(stop)) >= 0]
    return begin + response[: min(ends, default=len(response))]


def fenced(program: str) -> str:
    """A program as a block that the verifier finds, whatever backticks are in it."""
    fence = "`" * (1 + max((len(ticks) for ticks in _TICKS.findall(program)), default=2))
    return f"{fence}python\n{program.rstrip()}\n{fence}"
