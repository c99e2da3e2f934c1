"""Settings: file and flags give the same object, and everything wrong is told at once."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pydantic
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tulu_mega
from tulu_mega.config import DpoSettings, GenerateSettings, RmSettings, ScoreSettings, SftSettings, describe, load
from tulu_mega.config.megatron_fields import MEGATRON
from tulu_mega.config.preference import PREFERENCE_LOSSES
from tulu_mega.errors import UserError, nearest

TOML = """
model = "dir"
run_dir = "run"
[data]
train = ["a.jsonl", "b.jsonl"]
[optim]
lr = 1e-5
betas = [0.9, 0.95]
"""
FLAGS = [
    "--model",
    "dir",
    "--run_dir",
    "run",
    "--data.train",
    '["a.jsonl", "b.jsonl"]',
    "--optim.lr=1e-5",
    "--optim.betas",
    "[0.9, 0.95]",
]


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "config.toml"
    path.write_text(TOML)
    return path


def problems(*flags, settings=SftSettings, file=None):
    with pytest.raises(UserError) as caught:
        load(settings, file and str(file), flags)
    return caught.value.problems


def test_file_and_flags_say_the_same(file):
    settings = load(SftSettings, str(file))
    assert settings == load(SftSettings, None, FLAGS)
    assert settings.model.path == "dir" and settings.optim.betas == (0.9, 0.95)


def test_flags_win(file):
    settings = load(
        SftSettings,
        str(file),
        ["--optim.lr", "3e-6", "--model.dtype", "fp32", "--data.shuffle=false", "--train.global-batch", "4"],
    )
    assert (settings.optim.lr, settings.model.dtype, settings.model.path) == (3e-6, "fp32", "dir")
    assert settings.data.shuffle is False and settings.train.global_batch == 4


def test_text_that_looks_like_a_number_stays_text(file):
    assert load(SftSettings, str(file), ["--run_dir", "2026"]).run_dir == "2026"


def test_settings_are_frozen(file):
    with pytest.raises(pydantic.ValidationError):
        load(SftSettings, str(file)).optim.lr = 1.0


@pytest.mark.parametrize(
    ("flags", "start"),
    [
        (["--optim.lrr", "1"], "optim.lrr: unknown setting; did you mean 'lr'?"),
        (["--lr", "1"], "lr: unknown setting; did you mean 'optim.lr'?"),
        (["--optim.lr", "-1"], "optim.lr: input should be greater than or equal to 0, got -1 (int)"),
        (["--optim.lr", "fast"], "optim.lr: input should be a valid number, got 'fast' (str)"),
        (["--model.dtype", "fp8"], "model.dtype: input should be 'bf16' or 'fp32', got 'fp8' (str)"),
        (["--optim.lr"], "--optim.lr: no value given"),
        (["stray"], "stray: expected --section.key value"),
        (["--seed.x", "1", "--seed", "2", "--seed.x", "1"], "--seed.x: 'seed' is not a section"),
        (["--megatron.tensor_model_parallel_size", "2"], "megatron: tensor_model_parallel_size is decided by parallel.tensor"),
        (["--parallel.virtual_pipeline", "2"], "parallel: virtual_pipeline = 2 needs pipeline of at least 2"),
        (["--parallel.overlap_param_gather", "true"], "parallel: overlap_param_gather needs distributed_optimizer and overlap"),
    ],
)
def test_what_is_said_of_a_mistake(file, flags, start):
    told = problems(*flags, file=file)
    assert any(problem.startswith(start) for problem in told), told


@pytest.mark.parametrize(
    ("flags", "start"),
    [
        (["--optim.betas", "[1.0, 0.999]"], "optim.betas.0: input should be less than or equal to 0.99999"),
        (["--optim.betas", "[0.9, 0.99999999]"], "optim.betas.1: input should be less than or equal to 0.99999"),
        (["--optim.eps", "1e-50"], "optim.eps: input should be greater than or equal to"),
        (["--optim.lr", "1e-5", "--optim.min_lr", "1e-4"], "optim: min_lr = 0.0001 is above lr = 1e-05"),
        (["--optim.schedule", "constant", "--optim.min_lr", "1e-4"], "optim: min_lr = 0.0001 is above lr = 1e-05"),
    ],
)
def test_an_optimizer_that_divides_by_0_is_refused(file, flags, start):
    """As megatron-core's schedule refuses a rate that rises, after the data is tokenised: with an assertion."""
    (told,) = problems(*flags, file=file)
    assert told.startswith(start)


def test_a_misspelt_megatron_field(file):
    if not MEGATRON.fields():
        pytest.skip("megatron-core is not installed")
    (told,) = problems("--megatron.attention_dropuot", "0.1", file=file)
    assert "attention_dropuot is not a field of megatron-core's TransformerConfig; did you mean 'attention_dropout'?" in told
    (told,) = problems("--megatron.attention_dropout", "'much'", file=file)
    assert "megatron-core wants float" in told


def test_all_problems_come_together():
    told = problems("--optim.lr", "x", "--train.steps", "0", "--nonsense", "1", "--last")
    names = {problem.split(":")[0] for problem in told}
    assert names == {"--last", "model", "run_dir", "data", "optim.lr", "train.steps", "nonsense"}


def test_files_that_cannot_be_read(tmp_path):
    assert problems(file=tmp_path / "none.toml")[0].endswith("give the path of a TOML file with the settings")
    broken = tmp_path / "broken.toml"
    broken.write_text("[optim\n")
    assert "not valid TOML" in problems(file=broken)[0] and "line 1" in problems(file=broken)[0]
    broken.write_bytes(b"\xff\xfe\x00")
    assert "cannot be read as text" in problems(file=broken)[0]


@pytest.mark.parametrize("settings", [SftSettings, ScoreSettings, GenerateSettings])
def test_describe_lists_every_setting_once(settings):
    names = [row[0] for row in describe(settings)]
    assert len(names) == len(set(names)) and "model.path" in names
    required = {name for name, _, default, _ in describe(settings) if default == "required"}
    assert {"model.path"} <= required <= {"model.path", "run_dir", "data.train", "input", "output"}


@given(st.floats(min_value=0, max_value=1e3, allow_subnormal=False), st.integers(1, 10**6), st.booleans())
def test_any_value_survives_a_flag(lr, batch, shuffle):
    flags = [*FLAGS, f"--optim.lr={lr!r}", "--train.global_batch", str(batch), "--data.shuffle", str(shuffle).lower()]
    settings = load(SftSettings, None, flags)
    assert (settings.optim.lr, settings.train.global_batch, settings.data.shuffle) == (lr, batch, shuffle)


def test_preference_losses_are_the_files_of_their_folder():
    files = {file.stem for file in Path(tulu_mega.__file__).parent.glob("objectives/preference/*.py")} - {"__init__"}
    rows = {name: (kind, told) for name, kind, _, told in describe(DpoSettings)}
    assert rows["preference.loss"][0].split(" | ") == sorted(files) == list(PREFERENCE_LOSSES)
    assert all(f"`{name}`: " in rows["preference.loss"][1] and f"for `{name}`" in rows["preference.beta"][1] for name in files)
    (told,) = problems("--run_dir=r", "--model=m", "--data.train=d", "--preference.loss=dpo_nrom", settings=DpoSettings)
    assert told.startswith("preference.loss: input should be '") and told.endswith("got 'dpo_nrom' (str)")


def test_settings_load_without_torch():
    code = "import sys, tulu_mega.config; sys.exit(str([m for m in ('torch', 'numpy', 'megatron') if m in sys.modules]))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stderr.strip() == "[]"


def test_nearest():
    assert nearest("globl_batch", ["global_batch", "lr"]) == "; did you mean 'global_batch'?"
    assert nearest("zzz", ["global_batch", "lr"]) == ""


def test_defaults_of_a_stage_survive_a_section_that_sets_something_else():
    rows = {"run_dir": "r", "model": "m", "data": {"train": "d"}, "optim": {"eps": 1e-6}, "train": {"log_every": 2}}
    dpo, rm = DpoSettings.model_validate(rows), RmSettings.model_validate(rows)
    assert (dpo.optim.lr, dpo.optim.warmup, dpo.train.epochs, dpo.train.global_batch) == (5e-7, 0.1, 1.0, 128)
    assert (rm.optim.lr, rm.train.epochs, rm.train.global_batch, rm.data.overlong) == (3e-6, 1.0, 256, "reject")


@pytest.mark.parametrize("stage", [SftSettings, RmSettings, DpoSettings])
def test_rows_to_evaluate_on(file, stage):
    assert load(stage, str(file)).heldout is None
    found = load(stage, str(file), ["--heldout", '["c.jsonl", "owner/d"]']).heldout
    assert (found.data, found.split, found.every, found.batch) == (["c.jsonl", "owner/d"], "test", 100, 256)
    told = problems("--heldout.evry", "5", "--heldout.batch", "0", settings=stage, file=file)
    assert [problem.split(":")[0] for problem in told] == ["heldout.data", "heldout.batch", "heldout.evry"]
    assert ("Conversations" if stage is SftSettings else "Pairs") in stage.model_fields["heldout"].description
