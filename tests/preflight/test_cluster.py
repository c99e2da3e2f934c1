"""What is told of nodes that do not go together; every problem names its node."""

import dataclasses

import pytest

from tulu_mega.config import SftSettings
from tulu_mega.errors import UserError
from tulu_mega.launch import sameness
from tulu_mega.preflight import cluster
from tulu_mega.preflight.cluster import Node, problems

SAME = {"package torch": "2.13.0", "setting optim.lr": "1e-05", "tulu_mega's code": "abc"}


def nodes(count: int = 3) -> list[Node]:
    return [Node(rank, f"n{rank}", dict(SAME), free_gib=100.0) for rank in range(count)]


def test_nodes_that_go_together():
    assert problems(nodes(), needed_gib=100.0) == []
    assert problems(nodes(1)) == []


def test_the_odd_one_out_is_named():
    found = nodes()
    found[2] = dataclasses.replace(found[2], same={**SAME, "package torch": "2.12.0"})
    del found[0].same["tulu_mega's code"]
    assert problems(found) == [
        "node n2 (rank 2): package torch is 2.12.0, elsewhere 2.13.0; make them the same",
        "node n0 (rank 0): tulu_mega's code is missing, elsewhere abc; make them the same",
    ]


def test_of_two_that_differ_the_first_is_taken_for_right():
    found = nodes(2)
    found[1].same["setting optim.lr"] = "2e-05"
    assert problems(found) == ["node n1 (rank 1): setting optim.lr is 2e-05, elsewhere 1e-05; make them the same"]


def test_clocks_files_ports_and_space():
    found = nodes()
    found[1] = dataclasses.replace(found[1], clock=-3.04, free_gib=4.0, unseen=("n0 (rank 0)",), unreachable=("n2 (rank 2)",))
    found[2] = dataclasses.replace(found[2], clock=1.9)
    clock, file, port, space = problems(found, needed_gib=10.0)
    assert clock.startswith("node n1 (rank 1): its clock is 3.0 s behind that of node n0 (rank 0)")
    assert file.startswith("node n1 (rank 1): a file that n0 (rank 0) wrote in run_dir is not seen there")
    assert port.startswith("node n1 (rank 1): n2 (rank 2) cannot be reached")
    assert space == "node n1 (rank 1): 4.0 GiB are free at run_dir, checkpoints and export take about 10.0; make room"


def test_ranks_that_share_a_cpu():
    """What Slurm gives a step's only task where nothing else is asked for."""
    found = nodes()
    found[1] = dataclasses.replace(found[1], ranks=8, cpus=1)
    found[2] = dataclasses.replace(found[2], ranks=8, cpus=96)
    (problem,) = problems(found)
    assert problem.startswith("node n1 (rank 1): its 8 processes may use 1 CPU(s) together; give the job's step all of")


def test_room_for_what_a_run_still_writes(tmp_path):
    """Checkpoints of 14 bytes a parameter, one more than are kept while it is written, and the export of 2."""
    (tmp_path / "model").mkdir()
    with (tmp_path / "model/model.safetensors").open("wb") as file:
        file.truncate(2**30)  # sparse
    settings = SftSettings.model_validate(
        {
            "model": str(tmp_path / "model"),
            "run_dir": str(tmp_path / "run"),
            "data": {"train": "x"},
            "checkpoint": {"keep": 3},
        }
    )
    assert cluster._needed_gib(settings) == 4 * 7 + 1
    (tmp_path / "run/checkpoints/step_4").mkdir(parents=True)
    assert cluster._needed_gib(settings) == 3 * 7 + 1
    elsewhere = settings.model_copy(update={"model": settings.model.model_copy(update={"path": "owner/not-fetched"})})
    assert cluster._needed_gib(elsewhere) == 0


def test_a_layout_that_does_not_fit_the_world_is_told_before_nodes_are_looked_at(monkeypatch):
    for name, value in {"RANK": "0", "WORLD_SIZE": "32", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "8"}.items():
        monkeypatch.setenv(name, value)
    parallel = {"tensor": 2, "data": 2}
    settings = SftSettings.model_validate({"model": "m", "run_dir": "r", "data": {"train": "x"}, "parallel": parallel})
    with pytest.raises(UserError, match=r"= 4 processes, but torchrun started 32; set parallel.data to 16, or start 4$"):
        cluster.check(settings)


def test_the_code_that_is_compared_is_the_whole_package():
    assert {"cli.py", "agent.py", "train", "bridge"} <= {path.name for path in sameness.CODE.iterdir()}
