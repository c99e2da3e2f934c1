"""A user's own verifier, named by its import path."""

from __future__ import annotations

import importlib
from typing import Any

from tulu_mega.errors import UserError
from tulu_mega.rewards.numbers import EXPECTED, number
from tulu_mega.rewards.verdict import Messages, Verdict, Verifier, shortened


class Custom:
    """A function ``(response, ground_truth, *, messages)`` that returns a Verdict or a number, see `numbers.number`.

    A function that has an attribute ``check`` (a function of the ground truth that raises ValueError) has the ground truths
    of all rows checked before the run.
    """

    def __init__(self, function: Any):
        self.function = function

    def check(self, ground_truth: Any) -> None:
        if check := getattr(self.function, "check", None):
            check(ground_truth)

    def __call__(self, response: str, ground_truth: Any, *, messages: Messages | None = None) -> Verdict:
        answer = self.function(response, ground_truth, messages=messages)
        if isinstance(answer, Verdict):
            return answer
        score = number(answer)
        if score is None:
            raise TypeError(f"the verifier returned {shortened(answer)}; expected a Verdict or {EXPECTED}")
        return Verdict(score)


def load_custom(name: str, path: str) -> Verifier:
    """The verifier at ``module:function``; a class is called without arguments.

    Raises:
        UserError: the path has another form, or nothing callable is there.
    """
    module, colon, attribute = path.partition(":")
    if not (module and colon and attribute):
        raise UserError(f"verifier {name!r}: expected 'module:function', got {path!r}")
    try:
        target = getattr(importlib.import_module(module), attribute)
    except ImportError as error:
        raise UserError(f"verifier {name!r}: {module!r} cannot be imported ({error}); put its directory on PYTHONPATH") from error
    except AttributeError:
        raise UserError(f"verifier {name!r}: the module {module!r} has no {attribute!r}") from None
    if isinstance(target, type):
        target = target()
    if not callable(target):
        raise UserError(f"verifier {name!r}: {path!r} is a {type(target).__name__}, expected a function")
    return Custom(target)
