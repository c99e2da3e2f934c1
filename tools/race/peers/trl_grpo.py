"""GRPO with TRL's GRPOTrainer and transformers' own generation. Runs in the peers' environment; see ../bench_grpo.py.

Settings beside the prompts: `micro`, responses a forward pass. All responses of a step are generated at once.
"""

from __future__ import annotations

import json

from datasets import Dataset
from grpo_reward import judge
from laps import spec
from paced import Paced
from trl import GRPOConfig, GRPOTrainer
from trl_race import run


class PacedRollouts(Paced):
    """Laps that tell how long the responses were."""

    lengths: list[int]

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % self.steps == 0:
            self.laps.end(tokens=sum(self.lengths), responses=len(self.lengths), losses=[])
            self.lengths.clear()


def main() -> None:
    wanted = spec()
    paced = PacedRollouts(wanted["steps"])
    paced.lengths = []
    with open(wanted["prompts"], encoding="utf-8") as file:
        rows = Dataset.from_list([{"prompt": json.loads(line)["messages"][0]["content"]} for line in file])

    def reward(completions: list[str], completion_ids: list[list[int]], **_: object) -> list[float]:
        paced.lengths.extend(map(len, completion_ids))
        return [judge(text, None) for text in completions]

    run(
        GRPOTrainer,
        GRPOConfig,
        wanted,
        rows,
        wanted["batch"],
        paced,
        more={"reward_funcs": reward},
        num_generations=wanted["samples"],
        max_completion_length=wanted["cap"],
        temperature=1.0,
        beta=0.0,
        loss_type="grpo",
        shuffle_dataset=False,
        gradient_checkpointing=False,
    )


if __name__ == "__main__":
    main()
