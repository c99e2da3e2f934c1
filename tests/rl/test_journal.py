"""Files of responses, which other programs read."""

from __future__ import annotations

import datetime
import json
from types import SimpleNamespace

import pyarrow.json

from tulu_mega.data.prompts import Prompt
from tulu_mega.records import Response
from tulu_mega.rewards.verdict import Verdict
from tulu_mega.rl import journal
from tulu_mega.rl.judging import JudgedResponse


def test_what_a_row_holds_breaks_no_reader(tmp_path):
    asked = [{"role": "user", "content": "\ud800?"}]
    prompt = Prompt([], asked, {"a": "\udfff", "b": float("nan"), "c": datetime.date(2020, 1, 2)}, "own\ud800", "")
    one = JudgedResponse(Response.of_one_turn([0], [1], [0.0], [0], "stop"), "4\ud83d", Verdict(0.0, "\ud800"), 0.0)
    journal.write_evaluation(tmp_path, 3, SimpleNamespace(prompts=SimpleNamespace(prompts=[prompt] * 2), judged=[one] * 2))
    file = journal.evaluation_file(tmp_path, 3)
    lines = [json.loads(line, parse_constant=lambda word: 1 / 0) for line in file.read_text(encoding="utf-8").splitlines()]
    assert [line["response"] for line in lines] == ["4\\ud83d"] * 2
    assert lines[0]["ground_truth"] == {"a": "\\udfff", "b": None, "c": "2020-01-02"}
    assert pyarrow.json.read_json(file).num_rows == 2
