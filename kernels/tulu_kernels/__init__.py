"""Triton kernels for tulu_mega, each beside a torch reference that is both its CPU path and its oracle.

    linear_logprob   hidden states x output embedding -> log-probability of labels, entropy; full logits never made
    dispatch         which of the two runs where

Nothing here knows of tulu_mega or megatron-core: process groups come in as callables.
"""

__version__ = "0.1.0"
