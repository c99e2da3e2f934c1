"""Writes the committed trajectories anew: python tests/invariant/write.py [sft] [dpo] [grpo]

That is allowed in a commit that changes what is computed on purpose, and says in its message what has changed and why. A commit
that moves code, or makes it faster, leaves the files as they are: if the tests of this folder fail there, it has changed results.
The reference is the run on one rank.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.invariant import material
from tests.invariant.server import served
from tests.invariant.stages import GRPO, STAGES, Stage


def reference(stage: Stage, directory: Path) -> dict[str, list[float]]:
    """The figures of the run on one rank."""
    stage.prepare(directory)
    layout = next(iter(stage.layouts))
    if stage is not GRPO:
        return stage.trajectory(directory, layout)
    with served(directory) as (flags, variables):
        return stage.trajectory(directory, layout, *flags, **variables)


def main(names: list[str]) -> None:
    known = {stage.name: stage for stage in STAGES}
    if unknown := [name for name in names if name not in known]:
        sys.exit(f"error: {', '.join(unknown)}: expected some of {', '.join(known)}")
    for name in names or known:
        with tempfile.TemporaryDirectory() as directory:
            figures = reference(known[name], Path(directory))
        material.write_json(known[name].file, figures)
        print(f"{known[name].file}: {figures}")


if __name__ == "__main__":
    main(sys.argv[1:])
