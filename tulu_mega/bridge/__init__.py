"""Weights between Hugging Face's tensors and Megatron's shards.

`rules` and `families` say which box of which tensor is which box of which shard; `hf_files` reads and writes the files;
`live` moves weights between files and a running model.
"""
