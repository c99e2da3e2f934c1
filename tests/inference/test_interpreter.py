"""`rollout.python`, `python` of generate and eval: what is looked at in another environment, and what is refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.lib.other_python import ROOT, other_python
from tulu_mega import __version__, cli
from tulu_mega.config import GrpoSettings
from tulu_mega.errors import UserError
from tulu_mega.inference.command_line import ServerOptions, command, environment, path_of
from tulu_mega.inference.interpreter import Interpreter, here, interpreter
from tulu_mega.outside.versions import code_digest, installed
from tulu_mega.preflight import policy
from tulu_mega.preflight.check import check
from tulu_mega.quickstart import tiny_model

SAYS = {
    "python": [3, 12, 1], "prefix": "/opt/serve", "missing": [], "program": __version__, "code": code_digest(), "cuda": "13.0",
    "requirements": {},
    "versions": {"torch": "2.13.0", "vllm": "0.32.0", "transformers": "5.19.0"},
    "installed": {"torch": "2.13.0", "cuda": "13.0", "nccl": "2.29.7", "vllm": "0.32.0"},
}  # fmt: skip


@pytest.fixture
def script(tmp_path):
    """Makes a file that may be executed."""

    def made(text: str, mode: int = 0o755) -> str:
        path = tmp_path / "python"
        path.write_text(text)
        path.chmod(mode)
        return str(path)

    return made


@pytest.fixture
def saying(script):
    """Makes a Python that says this of itself."""
    return lambda **other: script(f"#!/bin/sh\necho a line before it\necho '{json.dumps(SAYS | other)}'\n")


def told(given: str, setting: str = "rollout.python") -> str:
    with pytest.raises(UserError) as caught:
        interpreter(given, setting)
    assert all(problem.startswith(f"{setting} = {given!r}") and "\n" not in problem for problem in caught.value.problems)
    return caught.value.problems[0]


def test_what_cannot_be_started_is_told(script, tmp_path):
    assert "no such file; give the Python of an environment" in told(str(tmp_path / "absent/bin/python"))
    assert "no such file" in told("no-such-python-on-any-path")
    assert f"is a directory; give the Python in it, such as {tmp_path / 'bin/python'}" in told(str(tmp_path))
    assert "no such file" in told("~/no/such/python")
    assert "cannot be used as a Python with vllm and tulu_mega: Exec format error" in told(script("no program"))


def test_what_may_not_be_executed_is_told(script):
    assert "is not executable for you" in told(script("#!/bin/sh\n", 0o644))


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("exit 3", "it ended with status 3 and said nothing"),
        ("echo some words; echo 'libpython3.12.so: not found' >&2; exit 127", "libpython3.12.so: not found"),
        ("exit 0", "it ended with status 0 and said nothing"),
        ("echo hello", "its output is no list of packages"),
        ("echo 12", "it ended with status 0"),
    ],
)
def test_what_is_no_python_is_told(script, text, why):
    assert f"cannot be used as a Python with vllm and tulu_mega: {why}" in told(script(f"#!/bin/sh\n{text}\n"))


def test_a_python_that_says_nothing_is_not_waited_for_for_ever(script, monkeypatch):
    monkeypatch.setattr("tulu_mega.inference.interpreter.LOOK_SECONDS", 0.2)
    assert "it said nothing for 0.2 s" in told(script("#!/bin/sh\nexec sleep 60\n"))


@pytest.mark.parametrize(
    ("says", "why"),
    [
        ({"python": [3, 10, 4]}, "is Python 3.10.4; 3.11 or newer is needed"),
        ({"missing": ["vllm"]}, "vllm is not installed there; install tulu-mega with its 'cpu' or 'gpu' extra there"),
        ({"missing": ["vllm", "tulu_mega"]}, "vllm and tulu_mega are not installed there"),
        ({"program": "0.0.1"}, f"has tulu_mega 0.0.1, this is {__version__}; install the same in both"),
        ({"code": "0123456789ab"}, f"has other code of tulu_mega {__version__} than this (0123456789ab, here {code_digest()})"),
        ({"versions": {"torch": "2.12.0", "vllm": "0.32.0"}, "requirements": {"vllm": ["torch==2.13.0"]}}, "vllm 0.32.0 asks"),
    ],
)  # fmt: skip
def test_an_environment_that_does_not_do_is_told(saying, says, why):
    assert why in told(saying(**says), "python")


def test_one_that_does_is_taken_as_it_is_named(saying):
    path = saying()
    found = interpreter(path, "rollout.python")
    assert found == Interpreter(path, "/opt/serve", SAYS["installed"])
    (line, _) = interpreter(saying(versions={"vllm": "0.33.0"}, python=[3, 11, 0]), "python").notes
    assert line == f"python = {path!r}: vllm 0.33.0 was not tried with this program; expected ==0.32.0: should anything fail, " \
                   "pip install 'vllm==0.32.0'"  # fmt: skip


def test_it_starts_the_server_with_its_own_programs_first(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", "/usr/bin")
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib/libiomp5.so").touch()
    options = ServerOptions("DIR", python="/opt/serve/bin/python", prefix=str(tmp_path))
    assert command(options, 0, on_cpu=True)[:3] == ["/opt/serve/bin/python", "-m", "tulu_mega.vllm_plugin.api_server"]
    assert environment(options, "key", 0, Path("/s"), None, [0])["PATH"] == "/opt/serve/bin:/usr/bin"
    assert path_of(sys.executable) == {} and command(ServerOptions("DIR"), 0, on_cpu=True)[0] == sys.executable
    assert environment(options, "key", 0, Path("/s"), [[0]], None).get("LD_PRELOAD") in (str(tmp_path / "lib/libiomp5.so"), None)


@pytest.fixture
def run(tmp_path):
    tiny_model.make(tmp_path / "model", seed=0)
    row = {"messages": [{"role": "user", "content": "2+2?"}], "ground_truth": "4", "dataset": "gsm8k"}
    (tmp_path / "prompts.jsonl").write_text(json.dumps(row))
    return {
        "model": {"path": str(tmp_path / "model"), "dtype": "fp32"}, "run_dir": str(tmp_path / "run"),
        "data": {"train": str(tmp_path / "prompts.jsonl"), "max_prompt": 64}, "sampling": {"samples": 2, "max_tokens": 32},
    }  # fmt: skip


def test_check_looks_at_it_for_every_command_that_starts_vllm(run, saying, tmp_path, capsys, monkeypatch):
    absent = str(tmp_path / "absent")
    (problem,) = check(GrpoSettings.model_validate({**run, "rollout": {"python": absent}}))
    assert problem.startswith(f"rollout.python = {absent!r}: no such file")
    monkeypatch.setattr("tulu_mega.preflight.policy.look", lambda rollout: ({}, {}))  # nobody is there
    urls = {"python": absent, "urls": ["http://10.0.0.5:8000"]}
    assert check(GrpoSettings.model_validate({**run, "rollout": urls})) == [], "servers elsewhere have a Python of their own"
    model = ["--model", run["model"]["path"], "--model.dtype", "fp32"]
    (tmp_path / "problems.jsonl").write_text(json.dumps({"question": "2+2?", "answer": "#### 4"}) + "\n")
    rows = ["--tasks.gsm8k.data", str(tmp_path / "problems.jsonl"), "--tasks.gsm8k.shots", "0"]
    for words, setting in (
        (["serve", *model, "--rollout.python", absent], "rollout.python"),
        (["generate", *model, "--python", absent], "python"),
        (["eval", *model, *rows, "--output", str(tmp_path / "eval"), "--python", absent], "python"),
    ):
        for before in ([], ["check"]):
            assert cli.main([*before, *words]) == 2
            assert f"error: {setting} = {absent!r}: no such file" in capsys.readouterr().err
    notes: list[str] = []
    path = saying(versions={"vllm": "0.33.0"})
    check(GrpoSettings.model_validate({**run, "rollout": {"python": path}}), tell=notes.append)
    assert any("vllm 0.33.0 was not tried" in line for line in notes)


def test_ranks_and_servers_under_nccl_have_one_nccl(run, saying, monkeypatch):
    asked = GrpoSettings.model_validate({**run, "rollout": {"python": saying(), "transport": "nccl"}})
    for ours, theirs in (("2.29.7", "2.29.7"), (None, None)):
        monkeypatch.setattr(policy, "installed", lambda ours=ours: {"nccl": ours} if ours else {"torch": "2.13.0"})
        assert policy._one_nccl(asked, {"nccl": theirs} if theirs else {"torch": "2.13.0"}) == []
    monkeypatch.setattr(policy, "installed", lambda: {"nccl": "2.27.3"})
    (problem,) = (line for line in check(asked) if "NCCL" in line)
    assert "torch has NCCL 2.27.3 here and 2.29.7 in rollout.python" in problem and "install one in both" in problem
    auto = asked.model_copy(update={"rollout": asked.rollout.model_copy(update={"transport": "auto"})})
    assert not [line for line in check(auto) if "NCCL" in line]


def test_a_real_environment_tells_what_it_has(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    python = other_python(tmp_path / "other")
    found = interpreter(str(python), "rollout.python")
    assert found.path == str(python) and found.prefix == str(tmp_path / "other") and found.installed == installed()
    assert here()["versions"]["torch"] == found.installed["torch"] and found.notes == ()
