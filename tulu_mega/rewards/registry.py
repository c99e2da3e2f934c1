"""The verifiers by their names in the ``dataset`` column."""

from __future__ import annotations

import contextlib
import importlib
import itertools
import math
import pkgutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from tulu_mega.errors import UserError, nearest
from tulu_mega.rewards import verifiers
from tulu_mega.rewards.classes import classes_asked
from tulu_mega.rewards.code_tests import tests_of
from tulu_mega.rewards.cpu_limit import TooLong, cpu_limit
from tulu_mega.rewards.custom import load_custom
from tulu_mega.rewards.numbers import EXPECTED, number
from tulu_mega.rewards.sandbox import CodeLimits
from tulu_mega.rewards.verdict import Verdict, Verifier, VerifierInput

BUILT_IN = tuple(sorted(module.name for module in pkgutil.iter_modules(verifiers.__path__)))
"""The names of the built-in verifiers: the files of :mod:`tulu_mega.rewards.verifiers`."""
ALIASES = {
    "gsm": "gsm8k",
    "rlvr-gsm": "gsm8k",
    "rlvr-math": "math",
    "hendrycks_math": "math",
    "rlvr-ifeval": "ifeval",
    "ifeval_old": "ifeval",
    "code": "python_code",
}
_MOST_PROBLEMS = 20


@dataclass(frozen=True)
class RewardSpec:
    """How rows are judged, beyond what their columns say. Plain values: a worker process gets them as JSON."""

    weights: dict[str, float] = field(default_factory=dict)
    """Verifier -> factor of its score; 1 where not named."""
    custom: dict[str, str] = field(default_factory=dict)
    """Name in the ``dataset`` column -> ``module:function``; may replace a built-in one."""
    aliases: dict[str, str] = field(default_factory=dict)
    """Name in the ``dataset`` column -> verifier, such as ``{"ifeval": "ifeval_2024"}``."""
    code: CodeLimits = field(default_factory=CodeLimits)
    math_accepts: tuple[str, ...] = ()
    """Answers that `math` accepts although a policy may exploit them: "unevaluated" and "several"."""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> RewardSpec:
        """The inverse of :meth:`as_dict`."""
        return cls(**{**values, "code": CodeLimits(**values["code"]), "math_accepts": tuple(values["math_accepts"])})

    @classmethod
    def as_published(cls, **values: Any) -> RewardSpec:
        """Return a spec that judges as published scorers do, for evaluation: no policy was trained against them.

        >>> RewardSpec.as_published(aliases={"ifeval": "ifeval_2024"}).math_accepts
        ('unevaluated', 'several')
        """
        return cls(code=CodeLimits(objects=True), math_accepts=("unevaluated", "several"), **values)


DEFAULT_SPEC = RewardSpec()


class Judge:
    """Verifiers by name, loaded when they are first needed.

    Names are matched without regard to case: Tulu's data says ``gsm8k``, ``MATH``, ``ifeval``.

    Args:
        seconds: CPU time that a built-in verifier may take for a reply, in a program's main thread.

    Raises:
        UserError: an alias or weight names no verifier, a weight is no finite number, or a path of ``custom`` leads nowhere.
    """

    def __init__(self, spec: RewardSpec = DEFAULT_SPEC, seconds: float = math.inf):
        self.spec, self._seconds = spec, seconds
        self._custom = {name.lower(): path for name, path in spec.custom.items()}
        self._names, problems = _names(self._custom, spec.aliases)
        self._loaded: dict[str, Verifier] = {}
        self._options = {"python_code": (spec.code,), "math": (spec.math_accepts,)}
        for name, path in self._custom.items():
            try:
                self._loaded[name] = load_custom(name, path)
            except UserError as error:
                problems += error.problems
        self._weights: dict[str, float] = {}
        for name, weight in spec.weights.items():
            if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not math.isfinite(weight):
                problems.append(f"weight of verifier {name!r}: expected a finite number, got {weight!r}")
                continue
            try:
                self._weights[self.resolve(name)] = float(weight)
            except UserError as error:
                problems += [f"weights: {problem}" for problem in error.problems]
        if problems:
            raise UserError(problems)

    def resolve(self, name: str) -> str:
        """The verifier's own name.

        Raises:
            UserError: there is none of that name.
        """
        if name.lower() not in self._names:
            raise UserError(_unknown(name, self._names))
        return self._names[name.lower()]

    def verifier(self, name: str) -> Verifier:
        """The verifier of a name of the ``dataset`` column.

        Raises:
            UserError: there is none, or what it needs is missing on this machine.
        """
        key = self.resolve(name)
        if key not in self._loaded:
            kind: Callable[..., Verifier] = importlib.import_module(f"{verifiers.__name__}.{key}").VERIFIER
            self._loaded[key] = kind(*self._options.get(key, ()))
        return self._loaded[key]

    def check(self, row: Mapping[str, Any]) -> list[str]:
        """The problems of a row's ``dataset`` and ``ground_truth``; none when it can be judged."""
        if row.get("dataset") is None:
            return [f"no 'dataset'; expected {_DATASET}"]
        try:
            pairs = _pairs(row["dataset"], row.get("ground_truth"))
        except ValueError as error:
            return [str(error)]
        problems = []
        for name, ground_truth in pairs:
            try:
                if ground_truth is None and self.resolve(name) not in self._custom:  # a verifier of one's own may need none
                    raise ValueError("not given; expected what the verifier compares with")
                self.verifier(name).check(ground_truth)
            except UserError as error:
                problems += error.problems
            except ValueError as error:
                problems.append(f"ground_truth for {name!r}: {error}")
        return problems

    def built_in(self, dataset: Any) -> bool:
        """Return whether built-in verifiers alone judge a row: a crash of one of these is then the reply's fault."""
        names = [dataset] if isinstance(dataset, str) else dataset if isinstance(dataset, Sequence) else []
        resolved = [self._names.get(str(name).lower()) for name in names]
        return bool(resolved) and all(name in BUILT_IN and name not in self._custom for name in resolved)

    def unserved(self, dataset: Any, ground_truth: Any) -> list[str]:
        """Return the classes of the program of which a row's tests make objects, where objects are not served."""
        if self.spec.code.objects:
            return []
        asked: dict[str, None] = {}
        for name, truth in _pairs(dataset, ground_truth):
            if self.resolve(name) == "python_code" and name not in self._custom:
                statements = [test["statement"] for test in tests_of(truth) if "statement" in test]
                asked.update(dict.fromkeys(found for statement in statements for found in classes_asked(statement)))
        return list(asked)

    def __call__(self, sample: VerifierInput) -> Verdict:
        """Judges a sample; what a verifier raises becomes the verdict's error.

        With several verifiers the score is the sum of weight times score, and one that fails makes the whole sample an error.
        """
        details, parts, total, kind = [], {}, 0.0, ""
        try:
            pairs = _pairs(sample.dataset, sample.ground_truth)
        except ValueError as error:
            return Verdict.failed(str(error))
        for name, ground_truth in pairs:
            verdict = self._one(name, sample, ground_truth)
            if verdict.score is None:
                return verdict
            key = self.resolve(name)
            total += self._weights.get(key, 1.0) * verdict.score
            parts[_untaken(key, parts)] = verdict.score
            kind = kind or verdict.kind
            details.append(str(verdict.detail or "") if len(pairs) == 1 else f"{name}: {verdict.detail}")
        if number(total) is None:
            return Verdict.failed(f"the weighted scores add up to {total}; expected {EXPECTED}")
        return Verdict(total, "; ".join(details), parts=parts, kind=kind)

    def _one(self, name: str, sample: VerifierInput, ground_truth: Any) -> Verdict:
        try:
            verifier = self.verifier(name)
            if not self.built_in(name):
                verdict = verifier(sample.response, ground_truth, messages=sample.messages)
            else:
                with cpu_limit(self._seconds) if self._seconds < math.inf else contextlib.nullcontext():
                    verdict = verifier(sample.response, ground_truth, messages=sample.messages)
        except TooLong:
            return Verdict.of(False, f"took more than {self._seconds:g} s to judge", kind="time")
        except Exception as error:
            if isinstance(error, (MemoryError, RecursionError)) and self.built_in(name):  # which the reply brought about
                return Verdict.of(False, f"took too much to judge: {type(error).__name__}", kind="memory")
            return Verdict.failed(f"{name}: {type(error).__name__}: {error}")  # it is about the verifier
        return verdict if verdict.error is None else Verdict.failed(f"{name}: {verdict.error}")


def check_rows(
    rows: Iterable[Mapping[str, Any]],
    spec: RewardSpec = DEFAULT_SPEC,
    where: Callable[[int], str] = lambda index: f"row {index + 1}",
) -> list[str]:
    """Checks every row's ``dataset`` and ``ground_truth`` before a run.

    Args:
        where: names a row (counted from 0) in messages, as ``tulu_mega.data.sources.Rows.where`` does.

    Returns:
        the verifiers that the rows need, to be loaded ahead (:class:`tulu_mega.rewards.pool.VerifierPool`).

    Raises:
        UserError: with the first 20 problems and the number of the rest.
    """
    judge, problems, count, names = Judge(spec), [], 0, set()
    for index, row in enumerate(rows):
        found = judge.check(row)
        count += len(found)
        problems += [f"{where(index)}: {problem}" for problem in found[: _MOST_PROBLEMS - len(problems)]]
        if not found:
            names.update(judge.resolve(name) for name, _ in _pairs(row["dataset"], row.get("ground_truth")))
    if count > len(problems):
        problems.append(f"and {count - len(problems)} more problems of this kind")
    if problems:
        raise UserError(problems)
    return sorted(names)


def _untaken(name: str, taken: Mapping[str, Any]) -> str:
    """The name, or ``name#2``, ``name#3``... where a row names a verifier again."""
    numbered = itertools.chain([name], (f"{name}#{number}" for number in itertools.count(2)))
    return next(candidate for candidate in numbered if candidate not in taken)


_DATASET = "the name of a verifier, such as 'gsm8k', or a list of them"


def _pairs(dataset: Any, ground_truth: Any) -> list[tuple[str, Any]]:
    """Verifier names with their ground truths.

    Raises:
        ValueError: names that are no text, or lists of different lengths.
    """
    if isinstance(dataset, str):
        return [(dataset, ground_truth)]
    if not isinstance(dataset, Sequence) or not dataset or not all(isinstance(name, str) for name in dataset):
        raise ValueError(f"'dataset': expected {_DATASET}, got {dataset!r}")
    if len(dataset) == 1 and not (isinstance(ground_truth, list) and len(ground_truth) == 1):
        return [(dataset[0], ground_truth)]
    if isinstance(ground_truth, str) or not isinstance(ground_truth, Sequence) or len(ground_truth) != len(dataset):
        size = len(ground_truth) if isinstance(ground_truth, list) else f"a {type(ground_truth).__name__}"
        raise ValueError(f"'ground_truth': expected a list of {len(dataset)}, one for each verifier of 'dataset', got {size}")
    return list(zip(dataset, ground_truth, strict=True))


def _names(custom: Mapping[str, str], aliases: Mapping[str, str]) -> tuple[dict[str, str], list[str]]:
    """Return each name, in lower case, with its verifier; and, as problems, the aliases of no verifier."""
    names = {name: name for name in (*BUILT_IN, *custom)}
    problems = []
    for alias, target in aliases.items():
        key = ALIASES.get(target.lower(), target.lower())
        if key in BUILT_IN or key in custom:
            names[alias.lower()] = key
        else:
            problems.append(f"alias {alias!r}: {_unknown(target, names)}")
    return {**{alias: names[target] for alias, target in ALIASES.items()}, **names}, problems


def _unknown(name: str, names: Mapping[str, str]) -> str:
    known = ", ".join(sorted(set(names.values())))
    own = "name one of your own in rewards.custom (of eval: verifiers)"
    return f"unknown verifier {name!r}{nearest(name.lower(), names)}; known: {known}; {own}"
