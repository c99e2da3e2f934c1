"""Models and the answers that transformers gives to them, each made once for a module's tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.lib import jobs, world


class Truths:
    """``truths(kind, *how)`` gives a model's directory, that of the trained one, and the answers.

    Args:
        make_model: saves the model of a kind, on a process of its own.
        answers: of a directory, the one where the trained model is to be, and ``how``.
    """

    def __init__(self, factory: pytest.TempPathFactory, make_model: Callable[..., None], answers: Callable[..., Any]):
        self._factory, self._make_model, self._answers = factory, make_model, answers
        self._made: dict[tuple, tuple[str, str, Any]] = {}

    @classmethod
    def of_training(cls, factory: pytest.TempPathFactory, make_model: Callable[..., None], lr: float) -> Truths:
        """Hugging Face's answers of `jobs.hugging_face` to a kind, a reduction and a number of steps."""

        def answers(model: str, trained: str, reduction: str, steps: int) -> Any:
            return world.run(1, jobs.hugging_face, model, reduction, steps, lr, trained)[0]

        return cls(factory, make_model, answers)

    def __call__(self, kind: str | bool, *how: Any) -> tuple[str, str, Any]:
        if (kind, *how) not in self._made:
            root = self._factory.mktemp("truth")
            model, trained = str(root / "model"), str(root / "trained")
            world.run(1, self._make_model, model, kind)
            self._made[kind, *how] = model, trained, self._answers(model, trained, *how)
        return self._made[kind, *how]
