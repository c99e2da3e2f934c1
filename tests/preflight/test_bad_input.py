"""What users get wrong is found before anything is launched or written, and told in words, through the command line."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tulu_mega import cli
from tulu_mega.config import SftSettings, load
from tulu_mega.errors import UserError
from tulu_mega.launch import launcher, run_dir
from tulu_mega.launch.run_dir import locked
from tulu_mega.quickstart import task, tiny_model

LIMIT = 180
"""Seconds for a command of its own process."""


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A model and data that nothing is wrong with."""
    directory = tmp_path_factory.mktemp("good")
    tiny_model.make(directory / "model", seed=0)
    write_rows(directory / "train.jsonl", list(islice(task.demonstrations(seed=0), 4)))
    write_rows(directory / "texts.jsonl", [{"text": "one"}, {"input_ids": [1, 2, 3]}])
    return directory


@pytest.fixture
def place(good, tmp_path, monkeypatch):
    """A copy of it that a test may spoil."""
    shutil.copytree(good, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)

    def launched(*_, **__):
        raise AssertionError("ranks were started")

    monkeypatch.setattr(launcher, "start_world", launched)
    return tmp_path


SFT = ["sft", "--model.path", "model", "--data.train", "train.jsonl", "--run_dir", "run", "--train.steps", "2"]
SCORE = ["score", "--model.path", "model", "--input", "texts.jsonl", "--output", "scores.jsonl"]


def refused(capsys, place: Path, argv: list[str]) -> list[str]:
    """The problems told; status 2, no traceback, and not a file more than before."""
    before = sorted(str(path) for path in place.rglob("*"))
    assert cli.main(argv) == 2
    err = capsys.readouterr().err
    assert "Traceback" not in err
    lines = err.splitlines()
    problems = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    assert problems, err
    assert sorted(str(path) for path in place.rglob("*")) == before
    return problems


def write_rows(file: Path, rows: list[object]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def append(text: str) -> Callable[[Path], None]:
    def spoil(place: Path) -> None:
        with (place / "train.jsonl").open("a") as file:
            file.write(text + "\n")

    return spoil


def edit_json(name: str, **changes: object) -> Callable[[Path], None]:
    def spoil(place: Path) -> None:
        file = place / name
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))

    return spoil


def missing_shard(place: Path) -> None:
    names = load_file(place / "model/model.safetensors")
    weight_map = {name: f"model-0000{1 + at % 2}-of-00002.safetensors" for at, name in enumerate(names)}
    first = {name: value for name, value in names.items() if weight_map[name].startswith("model-00001")}
    save_file(first, place / "model/model-00001-of-00002.safetensors")
    (place / "model/model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def truncated(place: Path) -> None:
    os.truncate(place / "model/model.safetensors", 100_000)


def scrambled(place: Path) -> None:
    with (place / "model/model.safetensors").open("r+b") as file:
        file.seek(8)
        file.write(b"not a header")


def pickled(place: Path) -> None:
    (place / "model/model.safetensors").rename(place / "model/pytorch_model.bin")


def lost_tensor(place: Path) -> None:
    tensors = load_file(place / "model/model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, place / "model/model.safetensors")


def other_shape(place: Path) -> None:
    tensors = load_file(place / "model/model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"][:7].clone()
    save_file(tensors, place / "model/model.safetensors")


def fewer_words(place: Path) -> None:
    """A model whose vocabulary ends before the tokenizer's does."""
    tensors = load_file(place / "model/model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = tensors[name][:64].clone()
    save_file(tensors, place / "model/model.safetensors")
    edit_json("model/config.json", vocab_size=64)(place)


def no_tokenizer(place: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (place / "model" / name).unlink()


def no_template(place: Path) -> None:
    (place / "model/chat_template.jinja").unlink()


def held_out(*rows: object) -> Callable[[Path], None]:
    """A good held-out row and these."""
    return lambda place: write_rows(place / "heldout.jsonl", [*islice(task.demonstrations(seed=1), 1), *rows])


def empty_data(place: Path) -> None:
    (place / "train.jsonl").write_text("\n")


def no_data(place: Path) -> None:
    (place / "train.jsonl").unlink()


def a_run_of_another_model(place: Path) -> None:
    (place / "run").mkdir()
    settings = load(SftSettings, None, [*SFT[1:], "--optim.lr", "0.5"])
    there = json.loads(settings.model_dump_json())
    there["model"]["path"] = "elsewhere"
    (place / "run/config.json").write_text(json.dumps(there))


def nothing(place: Path) -> None:
    """The files are fine, the arguments are not."""


HELD_OUT = ["--heldout.data", "heldout.jsonl"]
NO_ANSWER = json.dumps({"messages": [{"role": "user", "content": "hello"}]})
CASES = {
    "unknown key": (nothing, ["--optim.lrr", "1"], ["optim.lrr: unknown setting; did you mean 'lr'?"]),
    "unknown section": (nothing, ["--optimizer.lr", "1"], ["optimizer"]),
    "wrong type": (nothing, ["--train.global_batch", "many"], ["train.global_batch: ", "got 'many'"]),
    "out of range": (nothing, ["--optim.lr=-1"], ["optim.lr: ", "got -1"]),
    "megatron's field": (nothing, ["--megatron.moe_ffn_hiden_size", "3"], ["moe_ffn_hiden_size is not a field", "did you mean"]),
    "heads": (nothing, ["--parallel.tensor", "3"], ["parallel.tensor = 3 does not divide the model's num_attention_heads = 4"]),
    "groups": (nothing, ["--parallel.tensor", "4"], ["parallel.tensor = 4 does not divide the model's num_key_value_heads = 2"]),
    "layers": (nothing, ["--parallel.pipeline", "7"], ["parallel.pipeline = 7"]),
    "missing shard": (missing_shard, [], ["00002-of-00002.safetensors: no such file, though model.safetensors.index.json names"]),
    "truncated shard": (truncated, [], ["model/model.safetensors: 100000 bytes, its header asks for", "truncated or damaged"]),
    "corrupt shard": (scrambled, [], ["model/model.safetensors: not a safetensors header"]),
    "pickled weights": (pickled, [], ["holds only pickled PyTorch weights (pytorch_model.bin), which are not loaded"]),
    "missing tensor": (lost_tensor, [], ["tensor model.norm.weight is missing; config.json asks for it"]),
    "wrong shape": (other_shape, [], ["tensor model.norm.weight is [7], config.json asks for [128]"]),
    "config of another size": (edit_json("model/config.json", intermediate_size=450), [], ["config.json asks for [450, 128]"]),
    "unknown architecture": (edit_json("model/config.json", architectures=["FooForCausalLM"]), [], ["FooForCausalLM"]),
    "broken config": (lambda place: (place / "model/config.json").write_text("{"), [], ["config.json: cannot be read as JSON"]),
    "no model": (nothing, ["--model.path", "./nowhere"], ["nowhere"]),
    "small vocabulary": (fewer_words, [], ["but the model's vocabulary has 64 entries"]),
    "no tokenizer": (no_tokenizer, [], ["model.path = 'model': the tokenizer cannot be loaded: no tokenizer.json there"]),
    "no template": (no_template, ["--data.template", "tokenizer"], ['ships no chat template; use the template "tulu"']),
    "malformed line": (append('{"messages": '), [], ["train.jsonl line 5: not valid JSON"]),
    "not an object": (append("[1, 2]"), [], ["train.jsonl line 5: expected a JSON object on each line, got list"]),
    "no answer": (append(NO_ANSWER), [], ["train.jsonl line 5: no assistant message, so there is nothing to train"]),
    "unknown role": (append(NO_ANSWER.replace("user", "bot")), [], ["train.jsonl line 5: message 1 has role 'bot'"]),
    "empty data": (empty_data, [], ["train.jsonl: no rows; expected at least one"]),
    "no data": (no_data, [], ["train.jsonl: no such file"]),
    "no held-out data": (nothing, ["--heldout", "gone.jsonl"], ["gone.jsonl: no such file; correct heldout.data"]),
    "held-out prompts": (held_out(json.loads(NO_ANSWER)), HELD_OUT, ["heldout.jsonl line 2: no assistant message"]),
    "held-out pairs": (held_out({"chosen": [], "rejected": []}), HELD_OUT, ["heldout.jsonl line 2: has chosen, rejected"]),
    "held-out rows of another model": (
        held_out({"input_ids": [1, 99999], "labels": [1, 99999]}), HELD_OUT, ["heldout.data holds token 99999, but the model's"],
    ),
    "held-out rows too long": (
        held_out(), [*HELD_OUT, "--data.overlong", "reject", "--data.max_length", "3"],
        ["heldout.data: none of the 1 rows can be used (1 too long", "data.train: none of the 4 rows can be used"],
    ),
    "held-out rows that are never evaluated": (held_out(), [*HELD_OUT, "--heldout.every", "0"], ["heldout.every: "]),
    "another model's run": (a_run_of_another_model, [], ["model.path was 'elsewhere', is 'model'", "optim.lr was 0.5, is 5e-06"]),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_sft(capsys, place, case):
    spoil, flags, telling = CASES[case]
    spoil(place)
    problems = refused(capsys, place, [*SFT, *flags])
    for text in telling:
        assert any(text in problem for problem in problems), problems


def test_everything_wrong_with_a_file_is_told_at_once(capsys, place):
    file = place / "c.toml"
    file.write_text('run_dir = "run"\n[model]\npath = "model"\n[data]\ntrain = 3\n[optim]\nlrr = 1\n[train]\nglobal_batch = 0\n')
    problems = refused(capsys, place, ["sft", str(file)])
    assert {problem.split(":")[0] for problem in problems} >= {"optim.lrr", "train.global_batch"}
    assert any(problem.startswith("data.train") for problem in problems)


def test_model_and_data_are_both_told(capsys, place):
    truncated(place)
    append(NO_ANSWER)(place)
    problems = refused(capsys, place, SFT)
    assert len(problems) == 2 and "truncated" in problems[0] and "train.jsonl line 5" in problems[1]


def test_check_finds_the_same_and_leaves_nothing(capsys, place):
    lost_tensor(place)
    (problem,) = refused(capsys, place, ["check", *SFT])
    assert "tensor model.norm.weight is missing" in problem


@pytest.mark.parametrize(
    ("size", "flags", "telling"),
    [
        (3, ["--parallel.tensor", "2"], "= 2 processes a replica do not divide the world of 3"),
        (4, ["--parallel.tensor", "2", "--parallel.data", "1"], "= 2 processes, but torchrun started 4"),
    ],
)
def test_a_world_that_does_not_fit(capsys, place, monkeypatch, size, flags, telling):
    world = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1"}
    for name, value in world.items():
        monkeypatch.setenv(name, str(value))
    (problem,) = refused(capsys, place, [*SFT, *flags])
    assert telling in problem


ROWS = {
    "several kinds": ({"text": "a", "input_ids": [1]}, "has text, input_ids of messages, text and input_ids; expected exactly"),
    "no kind": ({"id": 3}, "has none of messages, text and input_ids"),
    "text that is none": ({"text": 3}, "text is int; expected a string"),
    "tokens that are none": ({"input_ids": [1, "2"]}, "expected a list of whole numbers"),
    "no tokens": ({"input_ids": []}, "has no tokens"),
    "tokens beyond the vocabulary": ({"input_ids": [100000]}, "holds token 100000, but the model's vocabulary has"),
    "odd messages": ({"messages": "hello"}, "messages is 'hello' (str); expected a list"),
}


@pytest.mark.parametrize("case", ROWS)
def test_score_rows(capsys, place, case):
    row, telling = ROWS[case]
    write_rows(place / "texts.jsonl", [{"text": "fine"}, row])
    (problem,) = refused(capsys, place, SCORE)
    assert problem.startswith("texts.jsonl line 2: ") and telling in problem


def test_score_places(capsys, place):
    (problem,) = refused(capsys, place, [*SCORE[:-1], "nowhere/scores.jsonl"])
    assert "nowhere is no directory; make it first" in problem
    (place / "texts.jsonl").write_text('{"text": \n')
    (problem,) = refused(capsys, place, SCORE)
    assert problem.startswith("texts.jsonl line 1: not valid JSON")
    (place / "texts.jsonl").unlink()
    (problem,) = refused(capsys, place, SCORE)
    assert problem.startswith("input = texts.jsonl: cannot be read: No such file")


def in_a_process(place: Path, argv: list[str]) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(cli.__file__).parents[1])}
    command = [sys.executable, "-m", "tulu_mega", *argv]
    return subprocess.run(command, cwd=place, env=env, capture_output=True, text=True, timeout=LIMIT)


def test_in_a_process_of_its_own(place):
    truncated(place)
    done = in_a_process(place, SFT)
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1 and done.stderr.startswith("error: model/model.safetensors: 100000 bytes")
    assert not (place / "run").exists()


@pytest.mark.parametrize("command", [SFT, ["check", *SFT]], ids=["sft", "check"])
def test_a_directory_in_use(capsys, place, command):
    with locked(place / "run"):
        (problem,) = refused(capsys, place, command)
        assert problem == "run_dir = run: another run is writing there; wait for it or choose another run_dir"
        with pytest.raises(UserError, match="another run is writing there"), locked(place / "run"):  # what a rank would find
            pass
    with locked(place / "run"):
        pass


def test_a_file_system_without_locks_is_no_other_run(monkeypatch, place, capsys):
    """Lustre that is mounted without ``-o flock``."""

    def flock(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(run_dir.fcntl, "flock", flock)
    with locked(place / "run"):
        assert "its file system has no locks (Function not implemented)" in capsys.readouterr().err


def test_a_directory_that_cannot_be_made(place):
    (place / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written: Not a directory"), locked(place / "file/run"):
        pass


@pytest.mark.slow
def test_a_directory_in_use_and_a_process_of_its_own(place):
    with locked(place / "run"):
        done = in_a_process(place, [*SFT, "--model.dtype", "fp32"])
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "error: run_dir = run: another run is writing there; wait for it or choose another run_dir\n"
    assert sorted(path.name for path in (place / "run").iterdir()) == [".lock"]
