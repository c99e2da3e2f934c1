"""A custom objective: fine-tuning by the focal loss, which gives well-predicted tokens less weight.

On the quickstart's model and data, with two ranks (`tulu-mega quickstart` has made them):

    python examples/python/custom_objective.py examples/sft_tiny.toml --run_dir runs/focal
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import ClassVar

from tulu_mega import LossOutput, PackedBatch, Reads, SftSettings, TokenOutput, World, run_script


@dataclass(frozen=True)
class FocalObjective:
    """Mean of ``-(1 - p)^gamma log p`` over trained tokens (Lin et al., arXiv 1708.02002); gamma 0 is cross-entropy."""

    gamma: float = 2.0
    reads: ClassVar[Reads] = Reads.TOKENS
    reported: ClassVar[tuple[str, ...]] = ("nll",)  # a mean in metrics.jsonl
    largest: ClassVar[tuple[str, ...]] = ()

    def __call__(self, output: TokenOutput, batch: PackedBatch) -> LossOutput:
        logp_T = output.values_T  # 0 where nothing is trained, so such tokens add nothing
        focal = -(((1 - logp_T.exp()) ** self.gamma) * logp_T).sum()
        count = len(batch.labelled_N)
        # A sum and a count: the engine adds both over micro-batches and ranks, and divides once.
        return LossOutput(focal, count, {"nll": (-logp_T.detach().sum(), count)})


def run(settings: SftSettings, world: World) -> None:
    """Train on every rank; checkpoints, metrics, evaluation and export are those of `tulu-mega sft`."""
    from tulu_mega import opened_run  # brings megatron-core, which only ranks need

    with opened_run(settings, world) as training:
        training.fit(FocalObjective(), training.loader())


if __name__ == "__main__":
    sys.exit(run_script(run, SftSettings))
