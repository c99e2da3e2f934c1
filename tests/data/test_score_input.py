"""Which rows to score need a tokenizer, and what is refused."""

import json

import pytest

from tulu_mega.config import ScoreSettings, load
from tulu_mega.data import score_input
from tulu_mega.errors import UserError


class Letters:
    """A tokenizer of one token a letter."""

    chat_template = None

    def __call__(self, text, add_special_tokens):
        assert not add_special_tokens
        return {"input_ids": [ord(letter) for letter in text]}


@pytest.fixture
def loaded(monkeypatch):
    """The tokenizers that were loaded."""
    found = []
    monkeypatch.setattr(score_input, "load_tokenizer", lambda *asked, setting: found.append((*asked, setting)) or Letters())
    return found


SETTINGS = load(ScoreSettings, None, ["--model", "somewhere", "--input=a", "--output=b"])


@pytest.mark.parametrize("rest", [{"input_ids": None}, {"input_ids": None, "messages": None}, {}])
def test_a_text_beside_null_input_ids_has_its_tokenizer(loaded, rest):
    row = {"text": "ab", **rest}
    assert score_input.encoder(SETTINGS, [row], 200)(row) == [97, 98]
    assert len(loaded) == 1


def test_rows_of_both_kinds_share_a_tokenizer(loaded):
    rows = [{"input_ids": [5, 6], "text": None}, {"input_ids": None, "text": "a"}]
    encode = score_input.encoder(SETTINGS, rows, 200)
    assert [encode(row) for row in rows] == [[5, 6], [97]]
    assert len(loaded) == 1


@pytest.mark.parametrize("row", [{"input_ids": [5]}, {"input_ids": [5], "text": None, "messages": None}])
def test_tokens_need_no_tokenizer(loaded, row):
    assert score_input.encoder(SETTINGS, [row], 200)(row) == [5]
    assert not loaded


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"input_ids": None}, "has none of messages, text and input_ids"),
        ({"input_ids": [1], "text": "a"}, "has text, input_ids of"),
        ({"text": 5}, "text is int"),
        ({"text": "\ud800"}, "text has a lone surrogate in it"),
        ({"text": ""}, "has no tokens"),
        ({"input_ids": [1.5]}, "a list of whole numbers"),
        ({"input_ids": [True]}, "a list of whole numbers"),
        ({"input_ids": [200]}, "holds token 200"),
    ],
)
def test_a_row_that_cannot_be_scored_says_why(loaded, row, says):
    with pytest.raises(ValueError, match=says):
        score_input.encoder(SETTINGS, [row], 200)(row)


def test_lines_that_are_no_rows_are_told_together(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"text": "a"}) + "\n[1]\n{\n")
    with pytest.raises(UserError) as caught:
        score_input.read(str(file))
    assert [problem.split(":")[0] for problem in caught.value.problems] == [f"{file} line 2", f"{file} line 3"]
    file.write_text("")
    with pytest.raises(UserError, match="has no rows"):
        score_input.read(str(file))
    with pytest.raises(UserError, match="cannot be read"):
        score_input.read(str(tmp_path / "absent.jsonl"))
