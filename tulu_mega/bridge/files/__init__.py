"""Weights and what comes with them on disk, in Hugging Face's and Megatron's formats."""
