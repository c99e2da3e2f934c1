"""Training a Megatron model: forward and backward passes, optimizer, checkpoints, metrics, the loop."""
