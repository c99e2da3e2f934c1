"""tulu_mega: the Tulu 3 post-training recipe on Megatron-core models with vLLM rollouts."""

__version__ = "0.1.0"
