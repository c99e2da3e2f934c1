"""Log-probabilities of labels straight from hidden states: vocabulary-parallel, in bounded memory, full logits never made.

    function     the passes forward and backward over chunks of rows, whatever does the row work
    combine      a row's statistics of all shards to its log-probability and entropy
    reference    row work in torch: the CPU's path, and the oracle of
    rows         the same as Triton kernels
"""

from tulu_kernels.linear_logprob.function import WORKSPACE, linear_logprob

__all__ = ["WORKSPACE", "linear_logprob"]
