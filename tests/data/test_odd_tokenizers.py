"""Tokenizers under which text would be lost, cut otherwise each time, or trained without its end."""

from __future__ import annotations

import json

import pytest

from tests.lib.tokenizers import EOS
from tulu_mega.config import DataSettings, ModelSettings
from tulu_mega.data.chat import LOST, prompt_of
from tulu_mega.data.prepare import prepare
from tulu_mega.data.tokenizer import load_tokenizer
from tulu_mega.errors import UserError

TALK = [{"role": "user", "content": "Quito?"}, {"role": "assistant", "content": "hi"}]


def edited(directory, file, change):
    content = json.loads((directory / file).read_text())
    change(content)
    (directory / file).write_text(json.dumps(content))


def told(directory, rows, *talks):
    rows.write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks))
    data = DataSettings(train=str(rows), template="tulu", max_length=100)
    return prepare(data, ModelSettings(path=str(directory)), rows.parent / "store", progress=False).told


def test_text_that_has_no_tokens_is_told(tokenizer_dir, tmp_path):
    other = [{**TALK[0], "content": "who?"}, TALK[1]]
    assert told(tokenizer_dir, tmp_path / "rows.jsonl", TALK, other) == []
    edited(tokenizer_dir, "tokenizer.json", lambda content: content["model"]["vocab"].pop("Q"))
    lines = told(tokenizer_dir, tmp_path / "rows.jsonl", TALK, other)
    assert lines == ["warning: 1 rows lose characters without a token; take the model's own tokenizer"]
    tokenizer = load_tokenizer(str(tokenizer_dir))
    assert prompt_of(TALK[:1], tokenizer, "tulu")[1] == {LOST} and not prompt_of(other[:1], tokenizer, "tulu")[1]
    assert prompt_of([{**TALK[0], "content": "uQ"}], tokenizer, "tulu")[1] == {LOST}


def test_an_end_that_is_cut_into_text_is_told(tokenizer_dir, tmp_path):
    edited(tokenizer_dir, "tokenizer_config.json", lambda content: content.update(split_special_tokens=True))
    (line,) = told(tokenizer_dir, tmp_path / "rows.jsonl", TALK)
    assert line.startswith(f"warning: turns end in {EOS!r}, which the tokenizer cuts into tokens of text")


def test_a_tokenizer_that_draws_lots_is_refused(tokenizer_dir):
    load_tokenizer(str(tokenizer_dir))
    edited(tokenizer_dir, "tokenizer.json", lambda content: content["model"].update(dropout=0.1))
    with pytest.raises(UserError, match=r"tokenizer.json asks for dropout = 0.1: other tokens of the same text each time"):
        load_tokenizer(str(tokenizer_dir))
