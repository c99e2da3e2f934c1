"""Files as the benchmarks' own repositories have them."""

from __future__ import annotations

import csv

import pytest

from tulu_mega.errors import UserError
from tulu_mega.evaluation import rows
from tulu_mega.evaluation.settings import TaskSettings
from tulu_mega.evaluation.tasks import TASKS


def table(path, *lines) -> str:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(lines)
    return str(path)


def test_mmlus_own_files_are_read_with_the_subject_of_their_name(tmp_path):
    first = ('Which, "a"?', "one", "two, too", "three\nlines", "four", "C")
    law = table(tmp_path / "mmlu_law_test.csv", first, ("2?", *"abcd", "A"))
    table(tmp_path / "college_physics_test.csv", ("3?", *"efgh", "D"))
    found = rows.problems(TASKS["mmlu"], TaskSettings(data=law))
    assert [(problem.group, problem.answer) for problem in found] == [("law", "C"), ("law", "A")]
    assert "three\nlines" in found[0].messages[0]["content"]
    both = rows.problems(TASKS["mmlu"], TaskSettings(data=str(tmp_path)))
    assert [problem.group for problem in both] == ["college_physics", "law", "law"]
    dev = table(tmp_path / "law_dev.csv", ("1+1?", *"1234", "B"))
    assert rows.shots(TASKS["mmlu"], TaskSettings(data=law, shots_from=dev))[0].answer == "B"


@pytest.mark.parametrize(
    ("lines", "told"),
    [
        ([("question", "answer")], "row 1: has 2 columns; expected a question, four choices and a letter"),
        ([], "has no rows; expected a question, four choices and a letter in each"),
        ([("1?", *"abcd", "E")], "answer is 'E'; expected 0 to 3 or A to D; MMLU expects question, choices"),
    ],
)
def test_other_tables_are_refused(tmp_path, lines, told):
    with pytest.raises(UserError) as raised:
        rows.problems(TASKS["mmlu"], TaskSettings(data=table(tmp_path / "t.csv", *lines)))
    assert told in raised.value.problems[0]


def test_a_table_of_another_task_is_told(tmp_path):
    file = table(tmp_path / "t.csv", ("1?", *"abcd", "A"))
    with pytest.raises(UserError, match="GSM8K expects question, answer"):
        rows.problems(TASKS["gsm8k"], TaskSettings(data=file))
