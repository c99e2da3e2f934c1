"""Laps at the pace of a Hugging Face trainer's own steps. Runs in the peers' environment."""

from __future__ import annotations

from laps import Laps
from transformers import TrainerCallback

NEVER = 10**9


class Paced(TrainerCallback):
    """Starts and ends laps; the losses of the first are logged, to be compared.

    Args:
        steps: of a lap.
    """

    def __init__(self, steps: int):
        self.laps, self.steps, self.losses, self.tokens = Laps(), steps, [], 0
        self.trainer = None
        """set once there is one"""

    def on_train_begin(self, args, state, control, **kwargs):
        state.logging_steps = 1
        self.laps.ready()

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step % self.steps == 0:
            self.laps.begin()

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in (logs or {}):
            self.losses.append(logs["loss"])

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % self.steps == 0:
            state.logging_steps = NEVER
            seen = self.trainer._total_train_tokens
            self.laps.end(tokens=seen - self.tokens, losses=self.losses)
            self.tokens, self.losses = seen, []
