"""A custom verifier in `grpo`: an answer must be right, and short.

On the quickstart's model and prompts, whose rows name the verifier `last_number` (`tulu-mega quickstart` has made them):

    PYTHONPATH=examples/python tulu-mega grpo examples/grpo_tiny.toml --run_dir runs/brief --train.steps 20 \
        --rewards.custom.brief custom_verifier:brief --rewards.aliases.last_number brief
"""

from __future__ import annotations

import re


def brief(response: str, ground_truth: str, *, messages: list[dict[str, str]]) -> float:
    """The score of a response: 1 for the right last number, and a tenth less for each ten words, but at least 0.1."""
    numbers = re.findall(r"-?\d+", response)
    if not numbers or int(numbers[-1]) != int(ground_truth):
        return 0.0
    return max(0.1, 1.0 - 0.1 * (len(response.split()) // 10))


def check(ground_truth: object) -> None:
    """Refuse a row that cannot be judged; called for every row before the run starts."""
    if not re.fullmatch(r"-?\d+", str(ground_truth)):
        raise ValueError(f"expected a whole number, got {ground_truth!r}")


brief.check = check
