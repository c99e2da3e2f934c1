"""The command line: what it prints, where, and its exit status."""

from __future__ import annotations

import subprocess
import sys
import tomllib
import types

import pytest

from tulu_mega import cli
from tulu_mega.config import SftSettings, load
from tulu_mega.errors import STATUSES, Stopped, UserError
from tulu_mega.launch import launcher, reporting
from tulu_mega.resilience import watchdog


def call(capsys, *argv):
    status = cli.main(argv)
    captured = capsys.readouterr()
    return status, captured.out, captured.err


@pytest.mark.parametrize("argv", [(), ("--help",), ("-h",)])
def test_the_overview_names_every_command(capsys, argv):
    status, out, err = call(capsys, *argv)
    assert (status, err) == (0, "")
    for name in ("sft", "score", "generate", "quickstart", "check"):
        assert f"  {name} " in out


def test_version(capsys):
    assert call(capsys, "--version")[1].startswith("tulu-mega 0.")


@pytest.mark.parametrize(
    ("argv", "banned"), [(["--help"], "pydantic torch numpy"), (["sft", "--help"], "torch numpy megatron transformers")]
)
def test_help_imports_nothing_heavy(argv, banned):
    seen = f"[m for m in {banned.split()} if m in sys.modules]"
    code = f"import sys; from tulu_mega.cli import main; main({argv}); sys.exit(str({seen}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr.strip() == "[]"


@pytest.mark.parametrize("name", ["sft", "score", "generate", "quickstart"])
def test_help_of_a_command_lists_every_setting(capsys, name):
    status, out, err = call(capsys, name, "--help")
    assert (status, err) == (0, "")
    assert "--run_dir" in out if name in ("sft", "quickstart") else "--model.path" in out
    assert max(map(len, out.splitlines())) <= 130
    if name == "sft":
        assert "--model.dtype  bf16 | fp32, default bf16" in out
        assert "--parallel.data  int, not set" in out
        assert "--data.train  text or list of text or table, required" in out
        assert out.count("\n[optim]\n") == 1


def test_every_status_is_explained():
    """docs/reference/exit_statuses.md is made of the table."""
    assert {0, 2, watchdog.STATUS, reporting.KILLED, Stopped.status, 120, 130, 141} <= STATUSES.keys()


def test_a_flag_that_is_none_is_answered_with_the_order_of_arguments(capsys):
    status, _, err = call(capsys, "sft", "--optim.lr", "1e-5", "config.toml")
    assert status == 2 and "error: config.toml: expected --section.key value; a settings file comes before all flags" in err


def test_an_unknown_command_is_met_with_the_nearest(capsys):
    status, out, err = call(capsys, "scroe")
    assert (status, out) == (2, "")
    commands = ", ".join([*cli.COMMANDS, "check"])
    assert err == f"error: unknown command 'scroe'; did you mean 'score'?; commands: {commands}\n"


def test_every_problem_has_its_line(capsys, tmp_path):
    file = tmp_path / "c.toml"
    file.write_text('model = "m"\nrun_dir = "r"\n[data]\ntrain = "d"\n[optim]\nlrr = 1\n')
    status, _, err = call(capsys, "sft", str(file), "--train.global_batch", "0")
    assert status == 2
    assert sorted(line.split(":")[1] for line in err.splitlines()) == [" optim.lrr", " train.global_batch"]


def test_a_missing_file(capsys):
    status, _, err = call(capsys, "sft", "nowhere.toml")
    assert status == 2 and err.startswith("error: nowhere.toml: no such file")


def test_flags_alone_suffice_for_generate(capsys, monkeypatch):
    seen = []
    monkeypatch.setitem(sys.modules, "tulu_mega.inference.generate", types.SimpleNamespace(generate=seen.append))
    assert call(capsys, "generate", "--model", "DIR", "--input", "in.jsonl", "--samples=4")[0] == 0
    (settings,) = seen
    assert (settings.model.path, settings.input, settings.samples) == ("DIR", "in.jsonl", 4)


def test_flags_alone_suffice_for_score_and_ranks_get_the_same_arguments(capsys, monkeypatch):
    seen = []
    monkeypatch.setattr(launcher, "run", lambda *arguments, prepare: seen.append(arguments) or 5)
    argv = ["score", "--model", "DIR", "--input", "i", "--output", "o", "--parallel.tensor", "2"]
    assert call(capsys, *argv)[0] == 5
    ((target, settings, program),) = seen
    assert target == "tulu_mega.recipes.score:run"
    assert settings.model.path == "DIR" and settings.parallel.tensor == 2
    assert program == [sys.executable, "-m", "tulu_mega", *argv]


@pytest.mark.parametrize(
    ("raised", "status", "err"), [(UserError(["one", "two"]), 2, "error: one\nerror: two\n"), (KeyboardInterrupt(), 130, "")]
)
def test_how_commands_end(capsys, monkeypatch, raised, status, err):
    def run(settings):
        raise raised

    monkeypatch.setitem(sys.modules, "tulu_mega.inference.generate", types.SimpleNamespace(generate=run))
    assert call(capsys, "generate", "--model", "DIR") == (status, "", err)


def test_an_unexpected_error_keeps_its_traceback(monkeypatch):
    def run(settings):
        raise RuntimeError("a bug")

    monkeypatch.setitem(sys.modules, "tulu_mega.inference.generate", types.SimpleNamespace(generate=run))
    with pytest.raises(RuntimeError, match="a bug"):
        cli.main(["generate", "--model", "DIR"])


def test_a_missing_package_is_named():
    with pytest.raises(UserError, match="the package 'no_such_package' is not installed"):
        launcher.resolve("no_such_package.module:function")


@pytest.fixture
def preflight(monkeypatch):
    module = types.ModuleType("tulu_mega.preflight.check")
    module.problems = []
    module.check = lambda _settings, _verify, _tell: module.problems
    monkeypatch.setitem(sys.modules, "tulu_mega.preflight.check", module)
    return module


FLAGS = ["--model", 'a "quoted" \\ dir', "--run_dir", "r", "--data.train", '["a", "b"]', "--megatron.moe_ffn_hidden_size", "3"]


def test_check_prints_settings_that_read_back(capsys, tmp_path, preflight):
    status, out, err = call(capsys, "check", *FLAGS)
    assert (status, err) == (0, "")
    assert out.endswith("# sft: nothing wrong found\n")
    file = tmp_path / "printed.toml"
    file.write_text(out)
    assert load(SftSettings, str(file)) == load(SftSettings, None, FLAGS)
    assert tomllib.loads(out)["optim"]["betas"] == [0.9, 0.999]


def test_check_tells_everything_that_is_wrong(capsys, preflight):
    preflight.problems = ["model: gone", "data: empty"]
    status, out, err = call(capsys, "check", *FLAGS)
    assert status == 2 and "[optim]" in out
    assert err == "error: model: gone\nerror: data: empty\n"


def test_check_of_another_command(capsys, preflight):
    status, out, _ = call(capsys, "check", "score", "--model", "m", "--input", "i", "--output", "o")
    assert status == 0 and out.endswith("# score: nothing wrong found\n")


def test_check_without_a_command_says_whose_settings_it_takes_them_for(capsys, preflight):
    said = "these were read as settings of sft, since no command was named"
    status, _, err = call(capsys, "check", *FLAGS, "--rollout.servers", "2")
    assert status == 2 and "rollout" in err.splitlines()[0] and said in err.splitlines()[-1]
    for arguments in (("sft", *FLAGS, "--rollout.servers", "2"), ("missing.toml",)):
        status, _, err = call(capsys, "check", *arguments)
        assert status == 2 and said not in err


def test_check_help(capsys):
    assert "usage: tulu-mega check" in call(capsys, "check", "--help")[1]
