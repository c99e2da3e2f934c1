"""The quickstart's model: a Llama of a million random parameters with a tokenizer trained on the task's own text."""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from tulu_mega.quickstart.task import demonstrations

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

EOS = "<|end_of_text|>"
PAD = "<pad>"
VOCABULARY = 512
"""Tokens there may be: 256 bytes, eos, pad and what the task's words and names are merged from (some 420 in all)."""
MAX_LENGTH = 512
"""Tokens of prompt and response together."""

_TEXT_ROWS = 2000  # demonstrations the tokenizer is trained on: every template, name and object many times over


def make(directory: Path, seed: int) -> None:
    """Writes model and tokenizer as a Hugging Face directory; the same bytes for the same seed.

    Args:
        directory: made when missing.
        seed: of the random weights. The tokenizer does not depend on it.
    """
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(directory)
    make_model(seed, tokenizer).save_pretrained(directory)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE that splits numbers into digits: any text can be written, and arithmetic is done digit by digit."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from tulu_mega.data.tulu_template import TULU_CHAT_TEMPLATE

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[EOS, PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(_text(), trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=EOS, pad_token=PAD, model_max_length=MAX_LENGTH)
    tokenizer.chat_template = TULU_CHAT_TEMPLATE
    return tokenizer


def make_model(seed: int, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A Llama 3 in miniature, fp32: RMSNorm, SwiGLU, rotary positions, grouped-query attention, untied head.

    Heads, groups and widths are even, so that the model can be cut over two tensor parallel ranks; the vocabulary is a
    multiple of 8, as Tulu's is.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=math.ceil(len(tokenizer) / 8) * 8,
        hidden_size=128,
        intermediate_size=448,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=MAX_LENGTH,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        initializer_range=0.06,  # wider than the usual 0.02, which is for wider models
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def _text() -> Iterable[str]:
    """Conversations as the template renders them, for the tags are plain text and should be few tokens too."""
    for row in islice(demonstrations(seed=0), _TEXT_ROWS):
        yield "".join(f"<|{message['role']}|>\n{message['content']}\n" for message in row["messages"])
