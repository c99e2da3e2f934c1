"""`tulu-mega sft` with `[heldout]`: every layout and every batch gives transformers' loss, and training does not notice it."""

from __future__ import annotations

import itertools
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from tests.lib import jobs, world
from tests.lib.layouts import LAYOUTS, size
from tulu_mega.config import SftSettings
from tulu_mega.data.store import TokenStore
from tulu_mega.launch.launcher import World
from tulu_mega.preflight import check
from tulu_mega.quickstart import task, tiny_model
from tulu_mega.records import IGNORE

pytestmark = pytest.mark.ranks

STEPS = 3
HELDOUT = [30, 5, 61, 2, 17, 48, 9]
"""lengths: no batch size divides their number, and their trained tokens are far from even"""
OVERLAP = {"data": 2, "overlap_grad_reduce": True, "overlap_param_gather": True}


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """A model without a tokenizer, and rows of tokens."""
    directory = tmp_path_factory.mktemp("heldout")
    world.run(1, jobs.make_model, str(directory / "model"), True)
    for name, lengths, seed in (("train", jobs.LENGTHS, 3), ("heldout", HELDOUT, 9)):
        rows = [{"input_ids": one.input_ids, "labels": one.labels} for one in jobs.sequences(509, lengths, seed)]
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return directory


def settings(material: Path, run_dir: Path, **sections) -> SftSettings:
    values = {
        "run_dir": str(run_dir),
        "model": {"path": str(material / "model"), "dtype": "fp32"},
        "data": {"train": str(material / "train.jsonl"), "max_length": 64, "workers": 1},
        "heldout": {"data": str(material / "heldout.jsonl"), "every": 2, "batch": 3},
        "train": {"steps": STEPS, "global_batch": 8},
        "optim": {"lr": 3e-3, "schedule": "constant", "warmup": 0.0, "eps": 1e-6},
        "checkpoint": {"every": 2},
    }
    for name, section in sections.items():
        values[name] = section and {**values.get(name, {}), **section}
    return SftSettings.model_validate(values)


def sft(wanted: SftSettings) -> None:
    from tulu_mega.recipes.sft import run

    rank, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    run(wanted, World(rank, count, rank, count, count // wanted.parallel.model_parallel))


def ran(wanted: SftSettings) -> list[dict]:
    check.ready(wanted)
    parallel = wanted.parallel
    world.run(parallel.model_parallel * (parallel.data or 1), sft, wanted)
    return [row for row in lines(wanted) if row["step"]]


def lines(wanted: SftSettings) -> list[dict]:
    """All of metrics.jsonl, that of step 0 too."""
    return [json.loads(line) for line in (Path(wanted.run_dir) / "metrics.jsonl").read_text().splitlines()]


def transformers_loss(model: str | Path, rows: Path) -> tuple[float, float]:
    """Mean negative log-likelihood of the trained tokens of all rows, in float64; and the mean of the rows' means."""
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64)
    sums, counts = [], []
    for row in map(json.loads, rows.read_text().splitlines()):
        with torch.no_grad():
            logits = network(torch.tensor([row["input_ids"]])).logits[0, :-1]
        labels = torch.tensor(row["labels"][1:])
        sums.append(float(F.cross_entropy(logits, labels, reduction="sum", ignore_index=IGNORE)))
        counts.append(int((labels != IGNORE).sum()))
    return sum(sums) / sum(counts), sum(total / count for total, count in zip(sums, counts, strict=True)) / len(sums)


@pytest.fixture(scope="module")
def undisturbed(material, tmp_path_factory):
    wanted = settings(material, tmp_path_factory.mktemp("runs") / "one")
    return wanted, ran(wanted)


@pytest.mark.parametrize(
    ("layout", "batch", "pack_length", "reduction"),
    [
        (OVERLAP, 2, 64, "sum"),
        (LAYOUTS["TP2xCP2"], 7, 128, "token_mean"),
        (LAYOUTS["PP2xVPP2"], 4, 64, "sum"),
        (LAYOUTS["TP2xPP2"], 1, 96, "token_mean"),
    ],
    ids=["DP2 with overlap", "TP2xCP2", "PP2xVPP2", "TP2xPP2"],
)
def test_the_held_out_loss_is_transformers(material, tmp_path, layout, batch, pack_length, reduction):
    own = {"train": {"reduction": reduction}, "heldout": {"batch": batch}, "data": {"pack_length": pack_length}}
    wanted = settings(material, tmp_path / "run", parallel=layout, **own)
    assert size(layout) == wanted.parallel.model_parallel * (wanted.parallel.data or 1)
    found = ran(wanted)
    assert [row["step"] for row in found if "heldout_loss" in row] == [2, STEPS]
    assert {name for row in found for name in row if name.startswith("heldout")} == {"heldout_loss"}
    want, by_rows = transformers_loss(tmp_path / "run/hf", material / "heldout.jsonl")
    assert found[-1]["heldout_loss"] == pytest.approx(want, rel=2e-7)
    assert abs(by_rows / want - 1) > 1e-3  # tokens and rows are not weighed alike here


def test_one_process_gives_it_too_and_training_moved_it(material, undisturbed):
    wanted, found = undisturbed
    before, _ = transformers_loss(material / "model", material / "heldout.jsonl")
    want, _ = transformers_loss(Path(wanted.run_dir) / "hf", material / "heldout.jsonl")
    assert found[-1]["heldout_loss"] == pytest.approx(want, rel=2e-7)
    assert abs(want / before - 1) > 1e-3
    first, *others = lines(wanted)
    assert set(first) == {"step", "heldout_loss", "seconds_evaluation"} and first["step"] == 0 and first["seconds_evaluation"] > 0
    assert first["heldout_loss"] == pytest.approx(before, rel=2e-7) and others == found
    assert [row["step"] for row in found if row.get("seconds_evaluation", 0) > 0] == [2, STEPS]
    store = TokenStore.open(Path(wanted.run_dir) / "heldout")
    assert store.lengths.tolist() == HELDOUT


def test_conversations_are_tokenised_as_those_trained_on(tmp_path):
    tiny_model.make(tmp_path / "model", seed=0)
    task.write_jsonl(itertools.islice(task.demonstrations(0), 3), tmp_path / "rows.jsonl")
    model, rows = {"path": str(tmp_path / "model")}, str(tmp_path / "rows.jsonl")
    own = {"model": model, "data": {"train": rows, "max_length": 30}, "heldout": {"data": rows}}
    wanted = settings(tmp_path, tmp_path / "run", **own)
    assert check.check(wanted) == [] and not (tmp_path / "run").exists()
    check.ready(wanted)
    trained, held = (TokenStore.open(tmp_path / "run" / name) for name in ("data", "heldout"))
    assert trained.key == held.key and held.width == 1
    assert (len(held), held.dropped) == (2, 1) and held.cuts.any()  # data.max_length holds for both


def test_training_is_the_same_to_the_bit_without_it(material, undisturbed, tmp_path):
    found = ran(settings(material, tmp_path / "run", heldout=None))
    told = [[(row["loss"], row["grad_norm"]) for row in rows] for rows in (found, undisturbed[1])]
    assert told[0] == told[1] and "heldout_loss" not in found[-1]
    assert not (tmp_path / "run/heldout").exists()
    digests = [(Path(run) / "hf/model.safetensors").read_bytes() for run in (tmp_path / "run", undisturbed[0].run_dir)]
    assert digests[0] == digests[1]


def test_a_run_that_goes_on_evaluates_to_the_same_bits_and_not_again_before_its_first_step(material, undisturbed, tmp_path):
    wanted = settings(material, tmp_path / "run")
    shutil.copytree(undisturbed[0].run_dir, wanted.run_dir, symlinks=True)
    shutil.rmtree(Path(wanted.run_dir) / "checkpoints" / f"step_{STEPS:08d}")
    found = ran(wanted)
    told = [[(row["loss"], row["grad_norm"], row.get("heldout_loss")) for row in rows] for rows in (found, undisturbed[1])]
    assert told[0] == told[1]
    assert lines(wanted)[0] == lines(undisturbed[0])[0] and [row["step"] for row in lines(wanted)] == [*range(STEPS + 1)]
