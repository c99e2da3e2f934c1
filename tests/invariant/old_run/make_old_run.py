"""Makes files/: a run of `tulu-mega sft` that ended after 3 of its 6 steps, and what became of the same run undisturbed.

    python tests/invariant/old_run/make_old_run.py

What is committed was made by commit 603f72c, with two ranks under tensor parallelism, and stays: it stands for the run
directories that users have. A later commit that writes another form adds a directory of its own. All paths in files/ are
relative, so that it can be copied anywhere and the command started there.

files/
    model/ train.jsonl settings.toml   what is trained, on what, how
    run/                               config.json, metrics.jsonl of 3 steps, data/ (tokenised), checkpoints/ of step 3
    undisturbed/                       metrics.jsonl of all 6 steps, model.safetensors as exported after them
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[3]))

from tests.invariant import commands, material

FILES = Path(__file__).parent / "files"
DONE, STEPS = 3, 6
SETTINGS = {
    "model": {"path": "model", "dtype": "fp32"},
    "data": {"train": "train.jsonl", "max_length": 256, "pack_length": 384},
    "train": {"steps": STEPS, "global_batch": 8},
    "optim": {"lr": 3e-3},
    "checkpoint": {"every": DONE},
}


def main() -> None:
    shutil.rmtree(FILES, ignore_errors=True)
    material.make_model(FILES / "model")
    material.write_rows(FILES / "train.jsonl", material.conversations(32))
    commands.settings_file(FILES / "settings.toml", SETTINGS)
    commands.run(FILES, 2, "sft", "settings.toml", "--run_dir", "run", "--parallel.tensor", "2")

    run, undisturbed = FILES / "run", FILES / "undisturbed"
    undisturbed.mkdir()
    metrics = run / "metrics.jsonl"
    lines = metrics.read_text().splitlines(keepends=True)
    (undisturbed / metrics.name).write_text("".join(lines))
    metrics.write_text("".join(lines[:DONE]))
    (run / "hf/model.safetensors").rename(undisturbed / "model.safetensors")
    *_, last = sorted((run / "checkpoints").iterdir())
    for left in (run / "hf", last, run / "logs"):
        shutil.rmtree(left, ignore_errors=True)
    for left in (*FILES.glob("rank_*.txt"), run / ".lock"):
        left.unlink()


if __name__ == "__main__":
    main()
