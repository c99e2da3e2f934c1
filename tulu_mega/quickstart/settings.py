"""Settings of `tulu-mega quickstart`."""

from __future__ import annotations

from tulu_mega.config.sections import PositiveInt, Section


class QuickstartSettings(Section):
    run_dir: str = "runs/quickstart"
    """Directory of the model, the data and the runs made of them. What is complete there is used again."""
    seed: int = 0
    """Seed of the task's problems, the model's first weights and the training order."""
    steps: PositiveInt = 280
    """Optimizer steps of fine-tuning, 64 demonstrations each."""
    rm_steps: PositiveInt = 90
    """Optimizer steps of the reward model, 64 pairs each."""
    dpo_steps: PositiveInt = 60
    """Optimizer steps of preference tuning, 64 pairs each."""
    grpo_steps: PositiveInt = 40
    """Steps of reinforcement learning, 32 prompts of 16 responses each."""
