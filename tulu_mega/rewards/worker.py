"""A process that judges samples: ``python -m tulu_mega.rewards.worker``, spoken to by :mod:`tulu_mega.rewards.pool`.

One JSON object a line on standard input and output. What verifiers print goes to standard error. Before a sample is judged whose
verifiers are all built-in it says so: from then on whatever becomes of this process is the reply's doing.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
from typing import Any

from tulu_mega.errors import UserError
from tulu_mega.rewards.registry import Judge, RewardSpec
from tulu_mega.rewards.verdict import VerifierInput

_MEGABYTE = 1 << 20
_GRACE_S = 5.0
_CPU_SHARE = 0.8  # of the time that a sample has: its verdict is here before the time is over


def main() -> None:
    questions, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):  # for the process that asks; it closes our input
        signal.signal(number, signal.SIG_IGN)

    def answer(value: dict[str, Any]) -> None:
        answers.write(json.dumps(value).encode() + b"\n")
        answers.flush()

    setup = json.loads(questions.readline())
    limit = setup["memory_mb"] * _MEGABYTE
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    try:
        judge = Judge(RewardSpec.of(setup["spec"]), _CPU_SHARE * setup["timeout_s"])
        for name in setup["names"]:
            judge.verifier(name)
    except UserError as error:
        answer({"problems": error.problems})
        return
    answer({"ready": True})

    for line in questions:
        # Without a parent there is nobody to end a verifier that hangs: the alarm does.
        signal.setitimer(signal.ITIMER_REAL, setup["timeout_s"] + _GRACE_S)
        sample = VerifierInput(**json.loads(line))
        if judge.built_in(sample.dataset):
            answer({"begun": True})
        verdict = judge(sample)
        signal.setitimer(signal.ITIMER_REAL, 0)
        bloated = _peak_bytes() > limit / 2
        answer({"verdict": vars(verdict), "leaving": bloated})
        if bloated:
            sys.exit()


def _peak_bytes() -> int:
    """Most memory this program has held. Not ``ru_maxrss``: on Linux that is inherited through exec from a larger parent."""
    try:
        with open("/proc/self/status", encoding="ascii") as status:
            return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()
