"""The quickstart ends between 30% and 60% whatever the seed, so that later stages have room."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import pytest


@pytest.mark.acceptance
@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", [0, 1, 2, 3])
def test_accuracy_after_sft(tmp_path, seed):
    run_dir = tmp_path / "quickstart"
    started = time.monotonic()
    command = [sys.executable, "-m", "tulu_mega", "quickstart", "--run_dir", str(run_dir), "--seed", str(seed)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=850, check=False)
    assert ended.returncode == 0, ended.stderr[-2000:]

    def accuracy(output: str) -> float:
        results = json.loads((run_dir / output / "results.json").read_text())
        return results["tasks"]["rlvr"]["metrics"]["score"]["value"]

    before, after = accuracy("before"), accuracy("sft/eval")
    print(json.dumps({"seed": seed, "before": before, "after": after, "seconds": round(time.monotonic() - started)}))
    assert before < 0.1
    assert 0.3 <= after <= 0.6
