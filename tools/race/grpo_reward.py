"""The reward of the GRPO race, the same on both sides: cheap, and different from response to response."""

from __future__ import annotations


def judge(response: str, ground_truth: object, messages: object = None) -> float:
    """Share of a response's words that end in an odd digit."""
    words = response.split()
    return sum(word[-1] in "13579" for word in words) / max(len(words), 1)
