"""How responses are drawn. The module imports little, so that every caller can use it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Sampling:
    """How responses are drawn."""

    max_tokens: int = 512
    temperature: float = 0.0
    """0 takes the most probable token each time."""
    top_p: float = 1.0
    samples: int = 1
    seed: int = 0
    """Sample j of prompt i has a random stream of its own, whatever else is in the batch."""
    stop_ids: tuple[int, ...] = ()
    """Tokens that end a response, besides those the model directory names."""
    allowed_ids: tuple[int, ...] = ()
    """Tokens a response may be made of; any when empty."""

    def parameters(self, number: int) -> dict[str, Any]:
        """vLLM's SamplingParams for a prompt, by its number: with the seed it decides the prompt's random streams."""
        return {
            "n": self.samples,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "max_tokens": self.max_tokens,
            "seed": self.seed + number * self.samples,  # vLLM adds the sample's number
            "stop_token_ids": list(self.stop_ids),
            "allowed_token_ids": list(self.allowed_ids) or None,
            "detokenize": False,
        }
