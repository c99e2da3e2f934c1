"""`train.profile`: traces of chosen steps and ranks, which the report links and sums up; wrong ones are told before the run."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import pytest
import torch

from tests.lib import jobs, world
from tests.report.test_report import made
from tulu_mega.config import GrpoSettings, ProfileSettings, SftSettings
from tulu_mega.config.effects import Effect, effect_of
from tulu_mega.config.policy_run import steps_of
from tulu_mega.errors import UserError
from tulu_mega.launch.launcher import World
from tulu_mega.preflight import check
from tulu_mega.preflight.profile import check_ranks, check_steps
from tulu_mega.train.profiling import BETWEEN, StepProfiler, late, operations

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """A model without a tokenizer, and rows of tokens."""
    directory = tmp_path_factory.mktemp("profiled")
    world.run(1, jobs.make_model, str(directory / "model"), True)
    rows = [{"input_ids": one.input_ids, "labels": one.labels} for one in jobs.sequences(509)]
    (directory / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return directory


def settings(material: Path, run_dir: Path, **profile) -> SftSettings:
    return SftSettings.model_validate(
        {
            "run_dir": str(run_dir),
            "model": {"path": str(material / "model"), "dtype": "fp32"},
            "data": {"train": str(material / "train.jsonl"), "max_length": 64, "workers": 1},
            "parallel": {"data": 2},
            "train": {"steps": 3, "global_batch": 8, "profile": profile or None},
            "checkpoint": {"export": False},
        }
    )


def sft(wanted: SftSettings) -> None:
    from tulu_mega.recipes.sft import run

    rank = int(os.environ["RANK"])
    run(wanted, World(rank, 2, rank, 2, 2))


def profiled(profiler: StepProfiler, steps: range, ends: int = 0) -> None:
    """Some steps of a run, which may end in one of them."""
    for number in steps:
        with profiler.step(number):
            torch.ones(4, 4) @ torch.ones(4, 4)
            if number == ends:
                raise UserError("the run ends")


def files(run_dir: Path) -> list[str]:
    return sorted(file.name for file in (run_dir / "profile").glob("*")) if (run_dir / "profile").exists() else []


@pytest.mark.ranks
def test_a_run_s_profile_opens_in_its_report(material, tmp_path):
    wanted = settings(material, tmp_path / "run", step=2, steps=2, ranks=[1])
    check.ready(wanted)
    world.run(2, sft, wanted)
    name = "steps_000002_to_000003_rank_1"
    assert files(tmp_path / "run") == [f"{name}.json.gz", f"{name}.operations.json"]
    with gzip.open(tmp_path / f"run/profile/{name}.json.gz") as file:
        names = {event.get("name") for event in json.load(file)["traceEvents"]}
    assert {"step 2", "step 3"} <= names and "step 1" not in names and any("gloo" in str(name) for name in names)
    table = json.loads((tmp_path / f"run/profile/{name}.operations.json").read_text())
    names = {one["name"] for one in table["operations"]}
    assert table["microseconds"] > 0 and BETWEEN in names and any("mm" in name for name in names), names

    page = made(tmp_path / "run")
    (link,) = [link for link in page.links if not link.startswith("data:")]
    assert (tmp_path / "run" / link).is_file()
    top = table["operations"][0]
    share = top["self_microseconds"] / table["microseconds"]
    assert page.shows("Operations by their own time on the CPU", "operation", "ms", "share", "calls")
    assert page.shows(top["name"], f"{top['self_microseconds'] / 1e3:,.1f}", f"{share:.1%}", f"{top['calls']:,}")
    page = made(tmp_path / "run", output=str(tmp_path / "elsewhere"))
    (link,) = [link for link in page.links if not link.startswith("data:")]
    assert (tmp_path / "elsewhere" / link).is_file()


def test_steps_ranks_and_ends(tmp_path):
    window = ProfileSettings(step=3, steps=2, ranks=[0, 2])
    profiled(StepProfiler(window, 1, CPU, tmp_path), range(1, 6))
    profiled(StepProfiler(None, 0, CPU, tmp_path), range(1, 6))
    profiled(StepProfiler(window, 0, CPU, tmp_path), range(5, 9))  # a run that goes on behind them
    with pytest.raises(UserError):
        profiled(StepProfiler(window, 0, CPU, tmp_path), range(1, 9), ends=2)
    assert files(tmp_path) == []
    profiled(StepProfiler(window, 0, CPU, tmp_path / "in the middle"), range(4, 9))
    assert files(tmp_path / "in the middle")[0] == "steps_000004_to_000004_rank_0.json.gz"
    with pytest.raises(UserError, match="the run ends"):
        profiled(StepProfiler(window, 2, CPU, tmp_path / "ended"), range(1, 9), ends=3)
    assert files(tmp_path / "ended")[0] == "steps_000003_to_000003_rank_2.json.gz"
    assert late(window, 4).startswith("train.profile: steps 3 to 4 are done already") and not late(window, 3)


def test_a_profile_that_cannot_be_written_ends_no_run(tmp_path, capsys):
    (tmp_path / "profile").write_text("no directory")
    profiled(StepProfiler(ProfileSettings(step=2), 0, CPU, tmp_path), range(1, 5))
    assert "warning: train.profile: rank 0 has no profile: " in capsys.readouterr().err


def test_of_a_gpu_kernels_are_counted_and_no_marks():
    def event(key, kind, time, mark=False):
        return type("Event", (), {
            "key": key, "device_type": kind, "is_user_annotation": mark, "count": 2, "self_cpu_time_total": 99.0,
            "self_device_time_total": time,
        })()  # fmt: skip

    gpu, cpu = torch.autograd.DeviceType.CUDA, torch.autograd.DeviceType.CPU
    found = operations([event("gemm", gpu, 30.0), event("aten::mm", cpu, 30.0), event("step 4", gpu, 80.0, True)], "cuda")
    assert found == {"microseconds": 30.0, "operations": [{"name": "gemm", "self_microseconds": 30.0, "calls": 2}]}


def test_torn_profiles_are_told_and_left_out(tmp_path):
    from tests.report.test_report import make, step

    run = make(tmp_path / "run", [step(1)])
    (run / "profile").mkdir()
    for name, text in (("a", "{"), ("b", "[]"), ("c", '{"first_step": 1}')):
        (run / f"profile/{name}.operations.json").write_text(text)
    gone = {"first_step": 1, "last_step": 1, "rank": 0, "trace": "../../gone", "device": "cpu", "microseconds": 0}
    (run / "profile/d.operations.json").write_text(json.dumps({**gone, "operations": []}))
    page = made(run)
    told = "\n".join(page.text)
    assert all(f"profile/{name}.operations.json: not readable, left out" in told for name in "abc")
    assert "The trace, gone, is not there any more." in told.replace("\n", " ")


@pytest.mark.parametrize(
    ("parallel", "world_size", "told"),
    [
        ({"tensor": 2}, None, "ranks 2, 7, but the run has 2 (under torchrun there may be more: then set parallel.data)"),
        ({"tensor": 2, "data": 2}, None, "rank 7, but the run has 4; expected ranks from 0 to 3"),
        ({"tensor": 2}, "6", "rank 7, but the run has 6; expected ranks from 0 to 5"),
        ({"tensor": 2}, "8", None),
    ],
)
def test_ranks_that_are_not_there(material, tmp_path, monkeypatch, parallel, world_size, told):
    if world_size:
        monkeypatch.setenv("RANK", "0")
        monkeypatch.setenv("WORLD_SIZE", world_size)
    wanted = settings(material, tmp_path / "run", step=1, ranks=[0, 2, 7])
    wanted = SftSettings.model_validate({**wanted.model_dump(exclude={"accept_changes"}), "parallel": parallel})
    if told is None:
        check_ranks(wanted)
    else:
        with pytest.raises(UserError, match=r"^train\.profile\.ranks: ") as error:
            check_ranks(wanted)
        assert told in str(error.value)


def test_check_tells_of_steps_and_ranks_together(material, tmp_path):
    found = check.check(settings(material, tmp_path / "run", step=3, steps=2, ranks=[2]))
    assert [one.partition(":")[0] for one in found] == ["train.profile.ranks", "train.profile"]
    assert "steps 3 to 4, but the run has 3 (train.steps or train.epochs)" in found[1]
    assert not (tmp_path / "run").exists()


def test_steps_of_policies():
    wanted = GrpoSettings.model_validate(
        {"model": "m", "run_dir": "r", "data": {"train": "x"}, "train": {"prompts": 4, "profile": {"step": 3}}}
    )
    assert steps_of(wanted, 9) == 3
    check_steps(wanted.train.profile, 3)
    with pytest.raises(UserError, match="step 3, but the run has 2 "):
        check_steps(wanted.train.profile, steps_of(wanted, 8))


def test_it_does_not_decide_the_result():
    for kind in (SftSettings, GrpoSettings):
        assert effect_of(kind, "train.profile.step") is Effect.NONE
    with pytest.raises(ValueError, match="a rank is named more than once"):
        ProfileSettings(step=1, ranks=[1, 1])
