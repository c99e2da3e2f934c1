"""The quickstart learns whatever the seed, the opposite from swapped labels, and nothing from shuffled rewards."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tulu_mega.quickstart.demo import heldout_accuracy

pytestmark = [pytest.mark.alone, pytest.mark.servers]


def command(name: str, *arguments: object) -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "tulu_mega", name, *map(str, arguments)], capture_output=True, text=True, timeout=850, check=False
    )
    assert ended.returncode == 0, ended.stderr[-2000:]


def solved(output: Path) -> float:
    results = json.loads((output / "results.json").read_text())
    return results["tasks"]["rlvr"]["metrics"]["score"]["value"]


@pytest.mark.acceptance
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_recipe_learns_and_its_control_unlearns(tmp_path, seed):
    run_dir = tmp_path / "quickstart"
    started = time.monotonic()
    command("quickstart", "--run_dir", run_dir, "--seed", seed)
    seconds = time.monotonic() - started
    found = {
        "seed": seed,
        "seconds": round(seconds),
        "solved before": solved(run_dir / "before"),
        "solved after SFT": solved(run_dir / "sft/eval"),
        "solved after DPO-norm": solved(run_dir / "dpo/eval"),
        "solved after GRPO": solved(run_dir / "grpo/eval"),
        "seconds of GRPO": round((run_dir / "grpo/hf").stat().st_mtime - (run_dir / "grpo.toml").stat().st_mtime),
        "pairs told apart by the reward model": heldout_accuracy(run_dir / "rm"),
        "pairs with a positive DPO margin": heldout_accuracy(run_dir / "dpo"),
    }

    for stage, data in (("rm", "rm_pairs"), ("dpo", "pairs")):
        swapped = tmp_path / f"swapped_{data}.jsonl"
        pairs = map(json.loads, (run_dir / f"data/{data}.jsonl").read_text().splitlines())
        swapped.write_text("".join(json.dumps({"chosen": row["rejected"], "rejected": row["chosen"]}) + "\n" for row in pairs))
        control = tmp_path / f"{stage}-swapped"
        command(stage, run_dir / f"{stage}.toml", "--run_dir", control, "--data.train", swapped, "--checkpoint.export", "false")
        found[f"{stage} from swapped labels"] = heldout_accuracy(control)
    control = tmp_path / "grpo-shuffled"
    command("grpo", run_dir / "grpo.toml", "--run_dir", control, "--rewards.shuffle", "true", "--checkpoint.export", "false")
    found["solved after GRPO from shuffled rewards"] = [
        row["heldout_score"] for row in map(json.loads, (control / "metrics.jsonl").open()) if "heldout_score" in row
    ]
    print(json.dumps(found))

    assert found["solved before"] < 0.1
    assert 0.3 <= found["solved after SFT"] <= 0.6
    assert found["pairs told apart by the reward model"] > 0.8
    assert found["pairs with a positive DPO margin"] > 0.9
    assert found["rm from swapped labels"] < 0.2
    assert found["dpo from swapped labels"] < 0.1
    start = found["solved after DPO-norm"]
    assert found["solved after GRPO"] >= start + 0.15
    assert abs(found["solved after GRPO from shuffled rewards"][-1] - start) <= 0.05
