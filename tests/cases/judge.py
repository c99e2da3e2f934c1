"""python tests/cases/judge.py FILE...: prints the replies whose score is not the right one; exit status 1 if there are any."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tulu_mega.rewards import VerifierInput, VerifierPool


def main(files: list[str]) -> int:
    rows = [json.loads(line) for file in files for line in Path(file).read_text(encoding="utf-8").splitlines()]
    wrong = 0
    with VerifierPool(names=sorted({row["dataset"] for row in rows}), workers=1, timeout_s=40) as pool:
        for row in rows:
            (verdict,) = pool.judge([VerifierInput(row["response"], row["dataset"], row["ground_truth"])])
            if verdict.score != row["right"]:
                wrong += 1
                said = (verdict.error or verdict.detail)[:100]
                print(f"WRONG got {verdict.score} right {row['right']}  gold {row['ground_truth']!r}  ({row['why']})")
                print(f"      reply {row['response'][:90]!r}  {said!r}")
    print(f"{wrong} wrong of {len(rows)}")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
