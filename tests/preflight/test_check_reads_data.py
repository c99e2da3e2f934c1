"""`check` reads the data of every command that has any, says what will be left out, and finds out whose settings a file has."""

from __future__ import annotations

import json
from functools import cache, partial
from pathlib import Path

import pytest

from tulu_mega import cli
from tulu_mega.config import load
from tulu_mega.config.told import command_told
from tulu_mega.data.tools.row_kind import stages_of
from tulu_mega.errors import UserError
from tulu_mega.launch.launcher import resolve
from tulu_mega.preflight.check import check

resolved = cache(resolve)
KINDS = {
    name: partial(resolved, command.settings)
    for name, command in cli.COMMANDS.items()
    if not command.operands and name != "data inspect"
}


def chat(*texts: str) -> list[dict]:
    return [{"role": ("user", "assistant")[at % 2], "content": text} for at, text in enumerate(texts)]


SFT = {"messages": chat("a", "b b b b b b b b b b b b b b b b b b b b")}
PAIR = {"chosen": chat("a", "b"), "rejected": chat("a", "c")}
SAME = {"chosen": chat("a", "b"), "rejected": chat("a", "b")}
VERIFIABLE = {"messages": chat("1+1?"), "ground_truth": "2", "dataset": "gsm8k"}
GSM8K = {"question": "1+1?", "answer": "#### 2"}


@pytest.fixture
def place(tiny, tmp_path, monkeypatch) -> Path:
    """A directory with rows of every kind and the tiny model."""
    monkeypatch.chdir(tmp_path)
    Path("model").symlink_to(tiny)
    rows = {"sft": [SFT], "pairs": [SAME, PAIR, SAME], "prompts": [VERIFIABLE], "gsm8k": [GSM8K] * 3}
    for name, content in rows.items():
        Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    Path("table.csv").write_text("question,answer\n1,2\n")
    return tmp_path


def found(command: str, *flags: str) -> list[str]:
    return check(load(resolve(cli.COMMANDS[command].settings), None, flags), tell=lambda line: print(f"# {line}"))


EVAL = ("eval", "--model", "model", "--output", "out")
GENERATE = ("generate", "--model", "model", "--output", "out/answers.jsonl")
CLEAN = ("data decontaminate", "--output", "out", "--fields", '["question"]')
MIX = ("data mix", "--output", "mixed.jsonl")
INSPECT = ("data inspect", "--model", "model", "--model.dtype", "fp32")


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ((*EVAL, "--tasks.gsm8k", "gone.jsonl"), "gone.jsonl: no such file; correct tasks.gsm8k.data"),
        ((*EVAL, "--tasks.gsm8k", "table.csv"), "file type '.csv' is not known"),
        ((*EVAL, "--tasks.mmlu", "gsm8k.jsonl"), "gsm8k.jsonl line 1: choices is not a list of 4 texts; MMLU expects"),
        ((*EVAL, "--tasks.gsm8k", "gsm8k.jsonl"), "GSM8K, problem 1: the prompt has"),
        ((*GENERATE, "--input", "gone.jsonl"), "gone.jsonl: no such file"),
        ((*GENERATE, "--input", "gsm8k.jsonl"), "gsm8k.jsonl line 1: has no messages, prompt or input_ids"),
        (
            (*CLEAN, "--train", "gone.jsonl", "--evaluations", '{"gsm8k.jsonl" = "question"}'),
            "gone.jsonl: no such file; correct train",
        ),
        ((*CLEAN, "--train", "gsm8k.jsonl", "--evaluations", '{"table.csv" = "question"}'), "file type '.csv'"),
        (
            (*CLEAN, "--train", "sft.jsonl", "--evaluations", '{"gsm8k.jsonl" = "question"}'),
            "sft.jsonl line 1: has no field 'question'",
        ),
        ((*CLEAN, "--train", "gsm8k.jsonl", "--evaluations", '{"gsm8k.jsonl" = "q"}'), "gsm8k.jsonl line 1: has no field 'q'"),
        ((*MIX, "--data.train", "gone.jsonl"), "gone.jsonl: no such file; correct data.train"),
        ((*INSPECT, "--data.train", "gone.jsonl"), "gone.jsonl: no such file; correct data.train"),
    ],
)
def test_what_is_wrong_with_the_data_is_found(place, arguments, problem):
    before = sorted(place.rglob("*"))
    assert any(problem in each for each in found(*arguments)), found(*arguments)
    assert sorted(place.rglob("*")) == before


@pytest.mark.parametrize(
    ("arguments", "note"),
    [
        ((*EVAL, "--tasks.gsm8k", "gsm8k.jsonl", "--tasks.gsm8k.shots", "0"), "# tasks.gsm8k: 3 problems, 0 worked examples"),
        ((*GENERATE, "--input", "sft.jsonl"), ""),
        ((*GENERATE, "--input", "prompts.jsonl"), "# prompts.jsonl: 1 rows as conversations under the model's own template"),
        (
            (*CLEAN, "--train", "gsm8k.jsonl", "--evaluations", '{"gsm8k.jsonl" = "question"}'),
            "# train: gsm8k.jsonl: 3 of 3 rows",
        ),
        ((*MIX, "--data.train", '{"gsm8k.jsonl" = 2}', "--pairs", "true"), "# data.train: gsm8k.jsonl: 2 of 3 rows"),
        (
            ("dpo", "--model", "model", "--model.dtype", "fp32", "--run_dir", "run", "--data.train", "pairs.jsonl"),
            "# data.train: 2 of 3 pairs are left out: 2 with nothing to learn (the first: pairs.jsonl 1: chosen and",
        ),
        (
            (
                "sft",
                "--model",
                "model",
                "--model.dtype",
                "fp32",
                "--run_dir",
                "run",
                "--data.train",
                "sft.jsonl",
                "--data.max_length",
                "24",
            ),
            "# data.train: 1 of 1 sequences are cut off at data.max_length, by ",
        ),
    ],
)
def test_what_should_be_known_is_said(place, capsys, arguments, note):
    problems = found(*arguments)
    assert note in capsys.readouterr().out and (problems == []) == bool(note), problems


def told(name: str, content: str, *flags: str) -> str:
    Path(name).write_text(content)
    return command_told(name, flags, KINDS, stages_of)


RUN = 'model = "m"\nrun_dir = "r"\n[data]\ntrain = "{}.jsonl"\n'


@pytest.mark.parametrize(
    ("name", "content", "flags", "command"),
    [
        ("a.toml", RUN.format("sft"), (), "sft"),
        ("a.toml", RUN.format("prompts"), (), "grpo"),
        ("a.toml", RUN.format("gone"), (), "sft"),
        ("rm.toml", RUN.format("pairs"), (), "rm"),
        ("a.toml", RUN.format("pairs") + 'margin = "m"\n', (), "rm"),
        ("sft.toml", RUN.format("pairs") + "[preference]\nbeta = 1.0\n", (), "dpo"),
        ("a.toml", RUN.format("pairs") + "[preference]\nbetta = 1.0\n", (), "dpo"),
        ("a.toml", RUN.format("prompts") + "[sampling]\nsamples = 2\n", (), "grpo"),
        ("a.toml", 'model = "m"\noutput = "o"\n[tasks]\ngsm8k = "x.jsonl"\n', (), "eval"),
        ("a.toml", 'model = "m"\n[tasks]\ngsm8k = "x.jsonl"\n', ("--output", "o"), "eval"),
        ("a.toml", 'train = "a"\noutput = "o"\n[evaluations]\n"a.jsonl" = "q"\n', (), "data decontaminate"),
        ("score.toml", 'model = "m"\ninput = "i"\noutput = "o"\n', (), "score"),
        ("mix.toml", 'output = "o"\n[data]\ntrain = "a"\n', (), "data mix"),
        ("a.toml", "nonsense = 1\n", (), "sft"),
        ("a.toml", "not toml", (), "sft"),
    ],
)
def test_a_file_tells_its_command(place, name, content, flags, command):
    assert told(name, content, *flags) == command


def test_where_nothing_tells_the_command_is_asked_for(place):
    with pytest.raises(UserError, match=r"name the command: tulu-mega check rm a\.toml or tulu-mega check dpo a\.toml"):
        told("a.toml", RUN.format("pairs"))
    with pytest.raises(UserError, match=r"check score a\.toml or tulu-mega check generate"):
        told("a.toml", 'model = "m"\ninput = "i"\noutput = "o"\n')


def test_examples_tell_their_commands():
    for file in sorted((Path(__file__).parents[2] / "examples/tulu3/8b").glob("*.toml")):
        assert command_told(str(file), (), KINDS, stages_of) == file.stem.partition("_")[0]


def test_the_command_line_says_which_it_was(place, capsys):
    Path("a.toml").write_text('output = "mixed.jsonl"\n[data]\ntrain = "sft.jsonl"\n')
    assert cli.main(["check", "a.toml"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "# no command was named: read as settings of data mix"
    assert out[-2:] == ["# data.train: sft.jsonl: 1 of 1 rows", "# data mix: nothing wrong found"]
    assert cli.main(["check", "report", "runs/none"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "# report: its settings are in order; nothing else was looked at"
