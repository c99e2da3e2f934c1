"""A verifier's input and its verdict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from tulu_mega.rewards.numbers import EXPECTED, number

Messages = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Verdict:
    """The judgement of one response.

    A failure of the verifier itself (it crashed, hung, ran out of memory) says nothing about the response: then ``score``
    is None and ``error`` says what happened. Training must leave such a sample out, never count it as 0.

    Raises:
        ValueError: it has neither score nor error or both, or its score is no finite number.
    """

    score: float | None
    """None exactly when there is an ``error``; any number may be given (see `numbers.number`), and is a float then."""
    detail: str = ""
    """The found and the expected answer, for people."""
    error: str | None = None
    parts: dict[str, float] = field(default_factory=dict)
    """Verifier -> its own score, before its weight. One that is named again is ``name#2``: each judgement has its own entry."""
    kind: str = ""
    """Why the response lost score other than by a wrong answer ("time", "memory", "tampered"...).
    Counted in metrics; never a reason to leave the response out."""

    def __post_init__(self) -> None:
        for name in ("detail", "error"):  # lone surrogates of a response's own making could be written to no file
            if isinstance(text := getattr(self, name), str):
                object.__setattr__(self, name, text.encode("utf-8", "backslashreplace").decode())
        if (self.score is None) == (self.error is None):
            raise ValueError(f"a verdict has either a score or an error, got score={self.score!r}, error={self.error!r}")
        if self.score is not None:
            score = number(self.score)
            if score is None:
                raise ValueError(f"a verdict's score is {shortened(self.score)}; expected {EXPECTED}")
            object.__setattr__(self, "score", score)  # frozen, and a scalar of numpy or torch could not be sent as JSON

    @classmethod
    def failed(cls, error: str) -> Verdict:
        """The verdict of a verifier that could not judge."""
        return cls(None, error=error)

    @classmethod
    def of(cls, passed: bool, detail: str, kind: str = "") -> Verdict:
        """1 or 0."""
        return cls(1.0 if passed else 0.0, detail, kind=kind)


@dataclass(frozen=True)
class VerifierInput:
    """What a verifier reads: a response as text, and what its row says. Plain JSON values: they cross to a worker process.

    >>> VerifierInput("The answer is 1,200.", "gsm8k", "1200")
    VerifierInput(response='The answer is 1,200.', dataset='gsm8k', ground_truth='1200', messages=None)
    """

    response: str
    """The assistant's reply alone: no prompt, no template tags, no eos."""
    dataset: str | Sequence[str]
    """Names the verifier; a list names several, whose weighted scores are summed."""
    ground_truth: Any
    """What the verifier compares with; for a list of verifiers a list of the same length."""
    messages: Messages | None = None
    """The prompt."""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class Verifier(Protocol):
    """Judges responses. Pure: the same arguments give the same verdict."""

    def check(self, ground_truth: Any) -> None:
        """Called for every row before a run.

        Raises:
            ValueError: the ground truth has another form than the verifier reads; the message says which was expected.
        """
        ...

    def __call__(self, response: str, ground_truth: Any, *, messages: Messages | None = None) -> Verdict:
        """Judges one response against a ground truth that :meth:`check` accepts."""
        ...


def shortened(value: Any) -> str:
    """A value for people, of at most 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
