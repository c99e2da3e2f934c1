"""What a run depends on: another content is refused by name and accepted by name, another spelling goes through."""

import contextlib
import datetime
import json
import os
import shutil
import stat
import sys

import pytest

from tests.lib.pinned_inputs import CHANGES, WEIGHTS, Inputs, drop_line, edit, flip, restored
from tulu_mega.config import DpoSettings, GrpoSettings, PpoSettings, SftSettings, load
from tulu_mega.data.store import TokenStore
from tulu_mega.data.tokenizer import load_tokenizer
from tulu_mega.errors import UserError
from tulu_mega.launch import launcher
from tulu_mega.launch.run_dir import CONFIG
from tulu_mega.pins import digest, directories
from tulu_mega.pins.record import Pins, first_day
from tulu_mega.preflight import pinned
from tulu_mega.preflight.check import check, ready
from tulu_mega.rl.prompts import read

SETTINGS = {"sft": SftSettings, "dpo": DpoSettings, "grpo": GrpoSettings, "ppo": PpoSettings}


@pytest.fixture(scope="module")
def made(tiny, tmp_path_factory):
    return Inputs.make(tmp_path_factory.mktemp("inputs"), tiny).root


@pytest.fixture
def inputs(made, tmp_path, monkeypatch):
    """Inputs of one test's own, older than what is told from times."""
    root = tmp_path / "inputs"
    shutil.copytree(made, root)
    monkeypatch.syspath_prepend(str(root))
    monkeypatch.setattr(digest, "RACY", 0.0)
    monkeypatch.setattr(launcher, "uncollected", contextlib.nullcontext)  # half the time of these starts, where much is loaded
    yield Inputs(root)
    for name in ("pinned_verifier", "pinned_helper"):
        sys.modules.pop(name, None)


def settings(inputs, stage="sft", *flags):
    return load(SETTINGS[stage], None, [*inputs.flags(stage), *flags])


def start(inputs, stage="sft", *flags):
    """What happens before the ranks of a run start, and its first word in the run directory."""
    asked = settings(inputs, stage, *flags)
    ready(asked)
    (inputs.root / "run" / CONFIG).write_text(asked.model_dump_json())


def refusal(inputs, stage="sft", *flags):
    with pytest.raises(UserError) as caught:
        start(inputs, stage, *flags)
    return caught.value.problems


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.name)
def test_another_content(inputs, change, capfd):
    start(inputs, change.stage)
    before = (inputs.root / "run/pins.json").read_text()
    change.make(inputs.root)
    flags = [flag.replace("ROOT", str(inputs.root)) for flag in change.flags]
    (problem,) = refusal(inputs, change.stage, *flags)
    assert problem.startswith(f"{change.setting} = ") and change.told in problem
    assert problem.endswith(f"if it was changed on purpose, add --accept_changes {change.setting}")
    assert (inputs.root / "run/pins.json").read_text() == before

    start(inputs, change.stage, *flags, "--accept_changes", change.setting.partition(".")[0])
    assert f"accepted by --accept_changes {change.setting.partition('.')[0]}: {change.setting} = " in capfd.readouterr().err
    (record,) = json.loads((inputs.root / "run/pins.json").read_text())["accepted"]
    assert record["setting"] == change.setting and any(change.told in what for what in record["what"])
    start(inputs, change.stage, *flags)
    assert capfd.readouterr().err.count("accept") == 0


def test_the_same_content_in_another_place(inputs, monkeypatch, capfd):
    start(inputs)
    root = inputs.root
    shutil.copytree(root / "model", root / "copy")
    (root / "link").symlink_to(root / "copy")
    (root / "copy/README.md").write_text("what nobody reads")
    shutil.copy(root / "rows.jsonl", root / "again.jsonl")
    monkeypatch.chdir(root / "copy")
    elsewhere = {"model.path": "../link", "data.train": '{"../again.jsonl" = 0.5}', "heldout.data": "../heldout.jsonl"}
    start(inputs, "sft", *(text for name, value in elsewhere.items() for text in (f"--{name}", value)))
    start(inputs)
    shutil.copy(root / "model/tokenizer.json", root / "model/config.json.bak")
    start(inputs)
    assert "accept" not in capfd.readouterr().err


def test_data_sets_in_directories(inputs):
    root = inputs.root
    (root / "set").mkdir()
    shutil.copy(root / "rows.jsonl", root / "set/train.jsonl")
    start(inputs, "sft", "--data.train", str(root / "set"))
    shutil.copytree(root / "set", root / "moved")
    start(inputs, "sft", "--data.train", str(root / "moved"))
    flip(root / "moved/train.jsonl")
    drop_line(root / "moved/train.jsonl")
    (problem,) = refusal(inputs, "sft", "--data.train", str(root / "moved"))
    assert problem.startswith("data.train = ") and "(16 rows) was" in problem and "(15 rows) there is" in problem


@pytest.mark.parametrize("stage", ["sft", "grpo"])
def test_only_the_owner_may_enter_a_run(inputs, stage):
    start(inputs, stage)
    assert stat.S_IMODE((inputs.root / "run").stat().st_mode) == 0o700


def test_who_made_the_directory_before_shares_the_run(inputs):
    (inputs.root / "run").mkdir(mode=0o755)
    start(inputs)
    assert stat.S_IMODE((inputs.root / "run").stat().st_mode) == 0o755


def test_an_unchanged_file_is_read_once(inputs, monkeypatch):
    start(inputs)
    read = []
    monkeypatch.setattr(directories, "read", lambda path: read.append(path.name) or digest.read(path))
    start(inputs)
    assert read == []
    os.utime(inputs.root / "model/config.json")
    start(inputs)
    assert read == ["config.json"]
    monkeypatch.setattr(digest, "RACY", 60.0)  # too fresh to be told by its times
    os.utime(inputs.root / "model/config.json")
    start(inputs)
    start(inputs)
    assert read == ["config.json"] * 3


def test_verify_reads_what_has_the_stamp_of_before(inputs):
    """On a file system whose every time can be set back."""
    start(inputs)
    weights = inputs.root / WEIGHTS
    restored(weights)
    pins = Pins.read(inputs.root / "run")
    pins.pins["model.path"].parts["model.safetensors"].seen = [digest.stamp(weights)]
    pins.write(inputs.root / "run")
    told = []
    assert check(settings(inputs), tell=told.append) == []
    assert any(line.startswith("model.path = ") and "pinned" in line for line in told)
    (problem,) = check(settings(inputs), verify=True)
    assert problem.startswith("model.path = ") and "model.safetensors (" in problem
    flip(inputs.root / "run/heldout/tokens.npy")
    assert check(settings(inputs)) == [], "the next start sees it and tokenises anew"
    assert any("run/heldout/tokens.npy: not what was written there" in each for each in check(settings(inputs), verify=True))


def test_a_name_accepts_once(inputs):
    """It may have been left in a script; what names the change itself means no other."""
    start(inputs)
    flip(inputs.root / WEIGHTS)
    start(inputs, "sft", "--accept_changes", "model")
    edit(inputs.root / "model/tokenizer.json", '"version"', ' "version"')
    (problem,) = refusal(inputs, "sft", "--accept_changes", "model")
    flag = problem.partition("add --accept_changes ")[2].split()[0]
    assert flag.startswith("model.path@")
    start(inputs, "sft", "--accept_changes", flag)
    drop_line(inputs.root / "rows.jsonl")
    (problem,) = refusal(inputs, "sft", "--accept_changes", flag)
    assert problem.startswith("data.train = ")


def test_accepting_what_is_not_there(inputs, capfd, tmp_path):
    start(inputs)
    start(inputs, "sft", "--accept_changes", "model,data.train")
    assert "warning: --accept_changes model: no such change is there to accept; leave it out" in capfd.readouterr().err
    (problem,) = refusal(inputs, "sft", "--accept_changes", "model.paht")
    assert problem.startswith("accept_changes: 'model.paht' is nothing of this run; did you mean 'model.path'?")
    (tmp_path / "sft.toml").write_text('accept_changes = ["model"]\n')
    with pytest.raises(UserError, match="accept_changes: only on the command line"):
        load(SftSettings, str(tmp_path / "sft.toml"), inputs.flags("sft"))


def test_several_changes_are_told_at_once(inputs):
    start(inputs)
    flip(inputs.root / WEIGHTS)
    drop_line(inputs.root / "rows.jsonl")
    drop_line(inputs.root / "heldout.jsonl")
    assert [problem.split(" = ")[0] for problem in refusal(inputs)] == ["model.path", "heldout.data", "data.train"]


def test_a_run_of_before_gets_pins(inputs, capfd):
    start(inputs)
    (inputs.root / "run/pins.json").unlink()
    drop_line(inputs.root / "rows.jsonl")
    (problem,) = refusal(inputs)  # the tokenised rows say what they were made of
    assert problem.startswith("data.train = ") and "of 15 rows" in problem
    start(inputs, "sft", "--accept_changes", "data")
    assert "begun before its inputs were pinned; pinned now, as they are: model.path" in capfd.readouterr().err
    assert {"model.path", "data.train", "heldout.data"} == Pins.read(inputs.root / "run").pins.keys()


def test_a_start_that_came_to_nothing_pins_nothing(inputs):
    ready(settings(inputs))
    flip(inputs.root / WEIGHTS)
    start(inputs)
    start(inputs)


def test_other_settings_are_refused_as_ever(inputs):
    start(inputs)
    (problem,) = refusal(inputs, "sft", "--data.tokenizer", str(inputs.root / "model"))
    assert "data.tokenizer was None" in problem


def test_what_is_pinned(inputs):
    start(inputs, "grpo")
    pins = Pins.read(inputs.root / "run").pins
    assert pins.keys() == {"model.path", "data.train", "rewards.model", "rewards.custom", "rewards.verifiers"}
    assert {part.shown.split("(")[0].rsplit("/")[-1].strip() for part in pins["rewards.custom"].parts.values()} == {
        "pinned_verifier.py",
        "pinned_helper.py",
    }
    assert "rewards/verifiers/math.py" in pins["rewards.verifiers"].parts
    assert "rewards/verifiers/ifeval.py" not in pins["rewards.verifiers"].parts


@pytest.mark.parametrize("stage", ["sft", "grpo"])
def test_a_template_that_writes_the_date_writes_that_of_the_first_start(inputs, stage, monkeypatch, capfd):
    edit(inputs.root / "model/chat_template.jinja", "{% for m", "{{ strftime_now('%d %b %Y') }}{% for m")

    def on(day):
        class Then(datetime.date):
            @classmethod
            def today(cls):
                return day

        monkeypatch.setattr(pinned, "date", Then)
        start(inputs, stage)
        told = capfd.readouterr().err
        run = inputs.root / "run"
        shutil.rmtree(run / "data", ignore_errors=True)  # of sft: tokenised anew at each start
        if stage == "sft":
            ready(settings(inputs, stage))
            store = TokenStore.open(run / "data")
            return told, [store[at].input_ids for at in range(len(store))]
        return told, [prompt.ids for prompt in read(settings(inputs, stage), first_day(run)).train.prompts]

    first, ids = on(datetime.date(2024, 7, 26))
    assert "the chat template writes a date, that of 2024-07-26, the run's first start" in first
    again, then = on(datetime.date(2031, 1, 2))
    assert "2024-07-26" in again and then == ids
    assert load_tokenizer(str(inputs.root / "model")).decode(ids[0]).startswith("26 Jul 2024")
    pins = json.loads((inputs.root / "run/pins.json").read_text())
    del pins["day"]  # as it was before the day was kept
    (inputs.root / "run/pins.json").write_text(json.dumps(pins))
    assert first_day(inputs.root / "run") is None and "of the day on which the command runs" in on(datetime.date(2031, 1, 2))[0]
