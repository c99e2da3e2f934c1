"""Reinforcement learning's data: prompts, responses, rewards, groups, batches."""
