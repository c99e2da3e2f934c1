"""Tokenizers under which text would be lost, cut otherwise each time, or trained without its end."""

from __future__ import annotations

import json

import pytest

from tests.lib.tokenizers import EOS
from tulu_mega.config import DataSettings, ModelSettings
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


@pytest.mark.parametrize("lacking", ["Q", "Ã"])
def test_a_tokenizer_that_would_leave_out_characters_is_refused(tokenizer_dir, lacking):
    """It has no token for the unknown: text goes without a word, and the places of what follows are wrong."""
    edited(tokenizer_dir, "tokenizer.json", lambda content: content["model"]["vocab"].pop(lacking))
    with pytest.raises(UserError, match=f"has no token for '{'Q' if lacking == 'Q' else 'é'}' and would leave it out"):
        load_tokenizer(str(tokenizer_dir))


def test_an_end_that_is_cut_into_text_is_told(tokenizer_dir, tmp_path):
    edited(tokenizer_dir, "tokenizer_config.json", lambda content: content.update(split_special_tokens=True))
    (line,) = told(tokenizer_dir, tmp_path / "rows.jsonl", TALK)
    assert line.startswith(f"warning: turns end in {EOS!r}, which the tokenizer cuts into tokens of text")


def test_a_tokenizer_that_draws_lots_is_refused(tokenizer_dir):
    load_tokenizer(str(tokenizer_dir))
    edited(tokenizer_dir, "tokenizer.json", lambda content: content["model"].update(dropout=0.1))
    with pytest.raises(UserError, match=r"tokenizer.json asks for dropout = 0.1: other tokens of the same text each time"):
        load_tokenizer(str(tokenizer_dir))
