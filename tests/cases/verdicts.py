"""python tests/cases/verdicts.py: what becomes of a verifier of one's own that returns something odd.

Right is a verdict that failed, with no score and an error that says why, or a number that is one.
"""

from __future__ import annotations

import os
from pathlib import Path

from tulu_mega.objectives.advantages import ESTIMATORS
from tulu_mega.rewards import VerifierInput, VerifierPool
from tulu_mega.rewards.registry import RewardSpec

HERE = Path(__file__).parent
NAMES = ("nan_verdict", "inf_verdict", "nan_float", "numpy_float", "torch_float", "str_verdict")


def main() -> None:
    os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])
    for name in NAMES:
        spec = RewardSpec(weights={}, custom={name: f"odd_verifiers:{name}"}, aliases={})
        with VerifierPool(spec, [name], 1, 30.0, 4096) as pool:
            verdicts = pool.judge([VerifierInput(reply, name, "x") for reply in ("a", "ab", "abc", "ab")])
        print(name, [(verdict.score, (verdict.error or "")[:70]) for verdict in verdicts[:2]])
        rewards = [None if verdict.score is None else 10 * verdict.score for verdict in verdicts]
        print("   advantages", ESTIMATORS["standardised"](rewards, [False] * 4).advantages)


if __name__ == "__main__":
    main()
