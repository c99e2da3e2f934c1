"""`tulu-mega convert`: streaming conversion between Hugging Face's format and Megatron's distributed checkpoint."""
