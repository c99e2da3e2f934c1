"""A tokenizer small enough to build anew: every byte a token, and a few merges that cross the borders of turns."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

EOS = "<|end_of_text|>"


def byte_tokenizer(**options) -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ċ", "Ċ"), ("h", "i"), ("Ġ", "b")]
    vocabulary = [EOS, *alphabet, *("".join(pair) for pair in merges)]
    backend = Tokenizer(models.BPE(vocab={token: number for number, token in enumerate(vocabulary)}, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, **{"eos_token": EOS, **options})
