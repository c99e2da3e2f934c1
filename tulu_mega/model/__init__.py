"""The model as megatron-core's `GPTModel`: layers for packed rows, rotary embedding, log-probabilities, reward head."""
