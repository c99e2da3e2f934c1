"""Triton kernels for tulu_mega, each beside a torch reference that is both its CPU path and its oracle.

    linear_logprob   hidden states x output embedding -> log-probability of labels, entropy; full logits never made
    policy_loss      log-probabilities of packed responses -> loss, metrics and gradient in one pass
    policy_choices   the names of what such a loss is made of, without torch
    segment_sums     sums over each sequence of a pack
    buckets          many boxes of tensors to and from a flat bucket
    fp8_blocks       weights -> E4M3 numbers with a scale for each block
    dispatch         which of the two runs where

Nothing here knows of tulu_mega or megatron-core: process groups come in as callables.
"""

__version__ = "0.1.0"
