"""A tokenizer that will not do is refused before anything is tokenised."""

import json

import pytest

from tulu_mega.data.chat import TULU_CHAT_TEMPLATE
from tulu_mega.data.tokenizer import load_tokenizer
from tulu_mega.errors import UserError


def test_the_models_own_or_another(tmp_path, tokenizer_dir):
    (tmp_path / "model").mkdir()
    assert load_tokenizer(str(tokenizer_dir), None).eos_token == "<|end_of_text|>"
    assert load_tokenizer(str(tmp_path / "model"), str(tokenizer_dir)).is_fast


def test_the_chat_template_survives_on_disk(tmp_path, tokenizer):
    tokenizer.chat_template = TULU_CHAT_TEMPLATE
    tokenizer.save_pretrained(tmp_path)
    assert load_tokenizer(str(tmp_path), None, "tokenizer").chat_template == TULU_CHAT_TEMPLATE


def refused(text, *args):
    with pytest.raises(UserError) as caught:
        load_tokenizer(*args)
    assert text in str(caught.value)
    assert "\n" not in caught.value.problems[0]


def test_refusals(tmp_path, tokenizer_dir, make_tokenizer):
    refused("no such directory", str(tmp_path / "nowhere"), None)
    refused("data.tokenizer = './nowhere'", str(tokenizer_dir), "./nowhere")
    refused("cannot be loaded", "nobody/nothing", None)
    refused("ships no chat template", str(tokenizer_dir), None, "tokenizer")
    make_tokenizer(eos_token=None).save_pretrained(tmp_path / "endless")
    refused("no eos token", str(tmp_path / "endless"), None)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.json").write_text(json.dumps({"model_type": "llama"}))
    refused("tokenizer.json", str(tmp_path / "empty"), None)
    (tmp_path / "empty" / "tokenizer.json").write_text("{broken")
    refused("cannot be loaded", str(tmp_path / "empty"), None)
