"""GRPO by this project's own command, its step and its vLLM server; what bench_grpo.py times."""

from __future__ import annotations

import os
from pathlib import Path

import prepared  # noqa: F401  before what imports megatron-core
from laps import Laps, spec

from tulu_mega.config import GrpoSettings
from tulu_mega.inference.for_run import servers
from tulu_mega.launch.launcher import World
from tulu_mega.recipes.grpo import Policy, opened_policy


def main() -> None:
    wanted, laps = spec(), Laps()
    settings = GrpoSettings.model_validate(
        {
            "run_dir": wanted["run_dir"],
            "model": {"path": wanted["model"], "dtype": "fp32"},
            "data": {
                "train": wanted["prompts"], "max_prompt": wanted["max_prompt"], "template": "tokenizer",
                "pack_length": wanted["pack"],
            },
            "rollout": {"servers": wanted["servers"]},
            "sampling": {"samples": wanted["samples"], "max_tokens": wanted["cap"]},
            "policy": {"beta": 0.0, "overlong": "keep", "aggregation": "sequence", "importance": wanted["importance"]},
            "rewards": {"scale": 1.0, "custom": {"odd": "grpo_reward:judge"}, "workers": 1},
            "train": {
                "steps": wanted["all_steps"], "prompts": wanted["batch"] // wanted["samples"], "mini_batches": 1,
                "filter_equal": False,
            },
            "optim": {"lr": wanted["lr"]},
            "checkpoint": {"export": False},
        }
    )  # fmt: skip
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    Path(settings.run_dir).mkdir(parents=True, exist_ok=True)
    with servers(settings, trainers=size) as pool:
        os.environ |= pool.for_ranks
        with opened_policy(settings, World(rank, size, rank, size, size)) as policy:
            laps_of(policy, laps, wanted["steps"])


def laps_of(policy: Policy, laps: Laps, steps: int) -> None:
    """Trains until the last step.

    Args:
        steps: of a lap.
    """
    policy.sync(0)
    laps.ready()
    responses = tokens = 0
    for step in range(policy.steps):
        if step % steps == 0:
            laps.begin()
            responses = tokens = 0
        collected = policy.collect(step)
        learned = policy.learn(step, collected)
        sync = policy.sync(step + 1)
        policy.report(step + 1, collected, learned, sync, heldout={})
        responses += len(collected.responses)
        tokens += sum(one.response.num_trained for one in collected.responses)
        if (step + 1) % steps == 0:
            laps.end(tokens=tokens, responses=responses, losses=[])


if __name__ == "__main__":
    main()
