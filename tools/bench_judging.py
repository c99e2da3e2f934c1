"""Measures the judging of programs: replies a second in the sandbox, beside the same programs and tests run without one.

    python tools/bench_judging.py [--laps 5] [--workers 1]

Eight programs of the kind that HumanEval asks for, each with a test of its kind (a `check` with six assertions), are judged as a
run of `grpo` judges them, and run in two other ways, lap by lap in turn. Prints one JSON line with, as medians of the laps:

    judged        replies a second through `VerifierPool`
    in_process    `exec` of program and test in this process: nothing is faster, and nothing is protected
    bare_process  `python -I` of program and test in one file, a process each: what judging costs without confinement
    of_in_process, of_bare_process   how many of these are judged in the same time
    calls         calls of the program's function a second by a test of 5,000; `in_process_calls` without a sandbox
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

from tulu_mega.rewards import CodeLimits, RewardSpec, VerifierInput, VerifierPool

CALLS = 5000
PROGRAMS = {
    "sum_of_squares": ("def sum_of_squares(xs):\n    return sum(x * x for x in xs)", ["[1, 2]", "[]"], ["5", "0"]),
    "is_palindrome": ("def is_palindrome(s):\n    return s == s[::-1]", ["'abba'", "'ab'"], ["True", "False"]),
    "fibonacci": (
        "def fibonacci(n):\n    a, b = 0, 1\n    for _ in range(n):\n        a, b = b, a + b\n    return a",
        ["10", "90"], ["55", "2880067194370816120"],
    ),
    "word_counts": (
        "from collections import Counter\ndef word_counts(text):\n    return dict(Counter(text.split()))",
        ["'a b a'", "''"], ["{'a': 2, 'b': 1}", "{}"],
    ),
    "primes": (
        "def primes(n):\n    return [p for p in range(2, n) if all(p % q for q in range(2, int(p ** 0.5) + 1))]",
        ["12", "2"], ["[2, 3, 5, 7, 11]", "[]"],
    ),
    "rotate": (
        "def rotate(xs, by=1):\n    return xs[-by % len(xs):] + xs[:-by % len(xs)]",
        ["[1, 2, 3]", "[4]"], ["[3, 1, 2]", "[4]"],
    ),
    "flatten": (
        "def flatten(xs):\n    return [y for x in xs for y in (flatten(x) if isinstance(x, list) else [x])]",
        ["[1, [2, [3]]]", "[]"], ["[1, 2, 3]", "[]"],
    ),
    "caesar": (
        "def caesar(s):\n    return ''.join(chr((ord(c) - 97 + 3) % 26 + 97) if c.islower() else c for c in s)",
        ["'abz'", "'A z'"], ["'dec'", "'A c'"],
    ),
}  # fmt: skip


def test_of(name: str) -> str:
    """A test of HumanEval's form with six assertions."""
    _, given, wanted = PROGRAMS[name]
    asserts = [f"    assert candidate({given[turn % 2]}) == {wanted[turn % 2]}" for turn in range(6)]
    return "\n".join(["def check(candidate):", *asserts, "", f"check({name})"])


def timed(run: Callable[[], object]) -> float:
    """Seconds that it takes."""
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def judged(pool: VerifierPool, repeats: int) -> None:
    samples = [
        VerifierInput(f"```python\n{program}\n```", "python_code", [test_of(name)])
        for name, (program, *_) in PROGRAMS.items()
        for _ in range(repeats)
    ]
    wrong = [verdict for verdict in pool.judge(samples) if verdict.score != 1.0]
    if wrong:
        raise SystemExit(f"a right program did not earn: {wrong[0]}")


def in_process(repeats: int) -> None:
    for name, (program, *_) in PROGRAMS.items():
        for _ in range(repeats):
            exec(compile(f"{program}\n{test_of(name)}", name, "exec"), {"__name__": "__main__"})


def bare_process(directory: str) -> None:
    for name, (program, *_) in PROGRAMS.items():
        file = os.path.join(directory, f"{name}.py")
        with open(file, "w", encoding="utf-8") as source:
            source.write(f"{program}\n{test_of(name)}")
        subprocess.run([sys.executable, "-I", file], check=True)


def calls(pool: VerifierPool, count: int) -> None:
    test = f"for x in range({count}):\n    assert f(x) == x + 1"
    [verdict] = pool.judge([VerifierInput("```python\ndef f(x): return x + 1\n```", "python_code", [test])])
    if verdict.score != 1.0:
        raise SystemExit(f"a right program did not earn: {verdict}")


def in_process_calls(count: int) -> None:
    exec(f"def f(x): return x + 1\nfor x in range({count}):\n    assert f(x) == x + 1", {})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--laps", type=int, default=5)
    parser.add_argument("--workers", type=int, default=1)
    arguments = parser.parse_args()
    laps: dict[str, list[float]] = {}

    def lap(side: str, count: int, run: Callable[[], object]) -> None:
        laps.setdefault(side, []).append(count / timed(run))

    spec = RewardSpec(code=CodeLimits(wall_s=60, total_s=60, cpu_s=60))
    with (
        VerifierPool(spec, ["python_code"], workers=arguments.workers, timeout_s=90) as pool,
        tempfile.TemporaryDirectory() as scratch,
    ):
        judged(pool, 1)
        for _ in range(arguments.laps):
            lap("judged", 4 * len(PROGRAMS), lambda: judged(pool, 4))
            lap("in_process", 50 * len(PROGRAMS), lambda: in_process(50))
            lap("bare_process", len(PROGRAMS), lambda: bare_process(scratch))
            alone = timed(lambda: calls(pool, 1))
            seconds = timed(lambda: calls(pool, CALLS + 1))
            laps.setdefault("calls", []).append(CALLS / max(seconds - alone, 1e-9))
            lap("in_process_calls", 100 * CALLS, lambda: in_process_calls(100 * CALLS))
    figures = {side: round(statistics.median(rates), 1) for side, rates in laps.items()}
    for side in ("in_process", "bare_process"):
        figures[f"of_{side}"] = round(statistics.median(a / b for a, b in zip(laps["judged"], laps[side], strict=True)), 4)
    machine = {"python": sys.version.split()[0], "cores": len(os.sched_getaffinity(0)), "load": round(os.getloadavg()[0], 1)}
    print(json.dumps({"programs": len(PROGRAMS), "workers": arguments.workers, "laps": arguments.laps, **figures, **machine}))


if __name__ == "__main__":
    main()
