"""Files as the benchmarks' own repositories have them."""

from __future__ import annotations

import csv
import json
from types import SimpleNamespace

import pytest

from tulu_mega.errors import UserError
from tulu_mega.evaluation import harness_prompts, rows
from tulu_mega.evaluation.settings import TaskSettings
from tulu_mega.evaluation.task import Shot
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
    with pytest.raises(UserError, match=r"file type '\.csv' is not known"):
        rows.problems(TASKS["gsm8k"], TaskSettings(data=file))


GSM8K_YAML = """\
task: gsm8k_cot
dataset_name: main
doc_to_text: 'Q: {{question}}

  A:'
doc_to_target: !function utils.target
fewshot_config:
  sampler: first_n
  samples:
  - {question: "How many?", target: "There are 3 - 1 = 2. The answer is 2."}
  - {question: "And now?", target: "The answer is 5."}
"""
BBH_YAML = """\
include: _cot_fewshot_template_yaml
task: bbh_cot_fewshot_SUB
dataset_name: SUB
description: "What SUB is.\\n\\n"
doc_to_text: "Q: {{input}}\\nA: Let's think step by step.\\n"
fewshot_config:
  samples: [{"input": "not True", "target": "So the answer is False."}, {"input": "True", "target": "So the answer is True."}]
"""


@pytest.fixture
def harness(tmp_path, monkeypatch):
    """lm-evaluation-harness as far as its files go."""
    package = tmp_path / "lm_eval"
    for name, text in {
        "gsm8k/gsm8k-cot.yaml": GSM8K_YAML,
        "gsm8k/gsm8k.yaml": "task: gsm8k\ndoc_to_text: '{{question}}'\n",
        **{f"bbh/cot_fewshot/{sub}.yaml": BBH_YAML.replace("SUB", sub) for sub in ("navigate", "snarks")},
        "bbh/cot_fewshot/_group.yaml": "group: bbh_cot_fewshot\ntask: [bbh_cot_fewshot_navigate]\n",
    }.items():
        file = package / "tasks" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    where = SimpleNamespace(submodule_search_locations=[str(package)])
    monkeypatch.setattr(harness_prompts, "find_spec", lambda name: where)
    return package / "tasks"


def jsonl(path, *lines) -> str:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


@pytest.mark.parametrize("named", ["lm_eval:gsm8k_cot", "gsm8k/gsm8k-cot.yaml"])
def test_gsm8ks_published_prompt_by_name(harness, tmp_path, named):
    source = named if named.startswith("lm_eval:") else str(harness / named)
    data = jsonl(tmp_path / "g.jsonl", {"question": "1 + 1?", "answer": "#### 2"})
    problems, shots = rows.problems_and_shots(TASKS["gsm8k"], TaskSettings(data=data, shots_from=source), True)
    assert [problem.messages for problem in problems] == [[{"role": "user", "content": "Q: 1 + 1?\nA:"}]]
    assert shots[0] == Shot("Q: How many?\nA:", "There are 3 - 1 = 2. The answer is 2.") and len(shots) == 2


def test_big_bench_hards_published_prompts_by_name(harness, tmp_path):
    subs = ("snarks", "navigate", "other")
    data = jsonl(tmp_path / "b.jsonl", *({"input": f"{sub}?", "target": "no", "task": sub} for sub in subs))
    settings = TaskSettings(data=data, shots_from="lm_eval:bbh_cot_fewshot")
    problems, shots = rows.problems_and_shots(TASKS["bbh"], settings, True)
    assert [problem.messages[0]["content"].partition("?")[0] for problem in problems] == ["Q: snarks", "Q: navigate", "Q: other"]
    assert {shot.group for shot in shots} == {"navigate", "snarks"} and len(shots) == 4
    first, second = rows.chosen(shots, 2, "snarks")
    assert first.question == "What snarks is.\n\nQ: not True\nA: Let's think step by step."
    assert second.question == "Q: True\nA: Let's think step by step." and second.answer == "So the answer is True."


def test_prompts_that_are_not_there_are_told(harness, tmp_path, monkeypatch):
    def told(source):
        data = jsonl(tmp_path / "g.jsonl", {"question": "1?", "answer": "#### 1"})
        with pytest.raises(UserError) as raised:
            rows.problems(TASKS["gsm8k"], TaskSettings(data=data, shots_from=source))
        return raised.value.problems[0]

    assert "lm_eval has no such task of gsm8k; did you mean 'gsm8k_cot'?" in told("lm_eval:gsm8k_cut")
    assert "has no worked examples of its own" in told("lm_eval:gsm8k")
    assert "cannot be read as YAML" in told(str(tmp_path / "gone.yaml"))
    monkeypatch.setattr(harness_prompts, "find_spec", lambda name: None)
    assert "lm_eval is not installed; pip install --no-deps lm_eval" in told("lm_eval:gsm8k_cot")


def test_gsm8k_is_judged_with_the_sign_as_others_do():
    assert TASKS["gsm8k"].read({"question": "1?", "answer": "#### -3"}).verifier == "last_number"
