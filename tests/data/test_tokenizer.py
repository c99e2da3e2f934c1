"""A tokenizer that will not do is refused before anything is tokenised."""

import base64
import json

import pytest
import sentencepiece
import tiktoken
from transformers.convert_slow_tokenizer import TikTokenConverter

from tulu_mega.data import tokenizer as tokenizer_module
from tulu_mega.data.chat import encode
from tulu_mega.data.tokenizer import load_tokenizer
from tulu_mega.data.tulu_template import TULU_CHAT_TEMPLATE
from tulu_mega.errors import UserError
from tulu_mega.records import IGNORE


def test_the_models_own_or_another(tmp_path, tokenizer_dir):
    (tmp_path / "model").mkdir()
    assert load_tokenizer(str(tokenizer_dir), None).eos_token == "<|end_of_text|>"
    assert load_tokenizer(str(tmp_path / "model"), str(tokenizer_dir)).is_fast


def test_the_chat_template_survives_on_disk(tmp_path, tokenizer):
    tokenizer.chat_template = TULU_CHAT_TEMPLATE
    tokenizer.save_pretrained(tmp_path)
    assert load_tokenizer(str(tmp_path), None, "tokenizer").chat_template == TULU_CHAT_TEMPLATE


def refused(text, *args, **kwargs):
    with pytest.raises(UserError) as caught:
        load_tokenizer(*args, **kwargs)
    assert text in str(caught.value)
    assert "\n" not in caught.value.problems[0]
    return caught.value.problems[0]


def test_refusals(tmp_path, tokenizer_dir, make_tokenizer):
    refused("no such directory", str(tmp_path / "nowhere"), None)
    refused("data.tokenizer = './nowhere'", str(tokenizer_dir), "./nowhere")
    told = refused("no such directory", str(tokenizer_dir), "./nowhere", setting="tokenizer")
    assert told.startswith("tokenizer = './nowhere'")
    refused("cannot be loaded", "nobody/nothing", None)
    refused("ships no chat template", str(tokenizer_dir), None, "tokenizer")
    make_tokenizer(eos_token=None).save_pretrained(tmp_path / "endless")
    refused("no eos token", str(tmp_path / "endless"), None)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.json").write_text(json.dumps({"model_type": "llama"}))
    refused("no tokenizer.json there; data.tokenizer names another", str(tmp_path / "empty"), None)
    refused("no tokenizer.json there; put the files of", str(tmp_path / "empty"), None, setting=None)
    (tmp_path / "empty" / "tokenizer.json").write_text("{broken")
    refused("cannot be loaded", str(tmp_path / "empty"), None)


TALK = [
    {"role": "user", "content": "the  quick 😀"},
    {"role": "assistant", "content": "brown fox\n"},
    {"role": "user", "content": "é"},
    {"role": "assistant", "content": "lazy dog"},
]


def trained(loaded):
    """Texts that are trained, in order."""
    ids, labels = encode(TALK, loaded, "tulu", None)
    turns, before = [], IGNORE
    for token, label in zip(ids, labels, strict=True):
        if label != IGNORE:
            turns += [[]] if before == IGNORE else []
            turns[-1].append(token)
        before = label
    return [loaded.decode(turn) for turn in turns]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    file = tmp_path_factory.mktemp("corpus") / "text.txt"
    file.write_text("\n".join(f"the quick brown fox {n} jumps over the lazy dog é {n * 7}" for n in range(300)))
    return file


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_a_sentencepiece_vocabulary(tmp_path, corpus, kind):
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus), model_prefix=str(tmp_path / "tokenizer"), vocab_size=320, model_type=kind, byte_fallback=True,
        character_coverage=1.0, normalization_rule_name="identity", remove_extra_whitespaces=False, minloglevel=2,
    )  # fmt: skip
    own = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    # without its class transformers forgets the blank that sentencepiece puts before a text
    refused("makes other tokens than tokenizer.model itself", str(tmp_path), None)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer", "eos_token": "</s>"}))
    loaded = load_tokenizer(str(tmp_path))
    for text in ("the quick brown fox", "two  blanks\n\n\tand lines ", "Größe 😀 12345", ""):
        assert loaded(text, add_special_tokens=False)["input_ids"] == own.encode(text)
    assert loaded.eos_token_id == own.eos_id()
    assert trained(loaded) == ["brown fox\n</s>", "lazy dog</s>"]


def test_a_tiktoken_vocabulary(tmp_path):
    ranks = {bytes([byte]): byte for byte in range(256)}
    for piece in (b"th", b"the", b" t", b"he", b" the", b"qu", b"ic", b"ick", b"quick"):
        ranks[piece] = len(ranks)
    lines = (f"{base64.b64encode(piece).decode()} {rank}\n" for piece, rank in ranks.items())
    (tmp_path / "tokenizer.model").write_text("".join(lines))
    refused("no eos token to end an answer; set it in tokenizer_config.json", str(tmp_path), None)
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": "<|end_of_text|>", "extra_special_tokens": ["<|end_of_text|>"]})
    )
    loaded = load_tokenizer(str(tmp_path))
    own = tiktoken.Encoding("own", pat_str=TikTokenConverter("").pattern, mergeable_ranks=ranks, special_tokens={})
    for text in ("the quick 😀", "  then\n\n  the 1234567 thick", "Größe's"):
        assert loaded(text, add_special_tokens=False)["input_ids"] == own.encode(text)
    assert loaded.eos_token_id == len(ranks)
    assert trained(loaded) == ["brown fox\n<|end_of_text|>", "lazy dog<|end_of_text|>"]


def test_a_vocabulary_that_cannot_be_read(tmp_path, monkeypatch):
    (tmp_path / "tokenizer.model").write_bytes(b"\x00\xff broken")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer", "eos_token": "</s>"}))
    refused("tokenizer.model cannot be used", str(tmp_path), None)
    monkeypatch.setattr(tokenizer_module, "find_spec", lambda name: None)
    refused("needs the package 'sentencepiece'", str(tmp_path), None)
