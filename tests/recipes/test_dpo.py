"""`tulu-mega dpo` whole: the first step, the reference cache, kill and resume, and what it says to bad input."""

from __future__ import annotations

import itertools
import json
import math
import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest

from tests.lib import world
from tulu_mega.config import DpoSettings
from tulu_mega.data.store import TokenStore
from tulu_mega.errors import UserError
from tulu_mega.launch.launcher import World
from tulu_mega.objectives.preference_objective import PreferenceObjective
from tulu_mega.preflight import adapters, check
from tulu_mega.preflight.findings import Findings
from tulu_mega.quickstart import task, tiny_model
from tulu_mega.recipes.dpo import check_first_loss, run
from tulu_mega.train import reference_cache
from tulu_mega.train.batch_loss import BatchLoss

pytestmark = pytest.mark.ranks

STEPS = 5


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    directory = tmp_path_factory.mktemp("dpo")
    for seed, name in enumerate(("model", "other")):
        tiny_model.make(directory / name, seed=seed)
    task.write_jsonl(itertools.islice(plain_pairs(0), 40), directory / "pairs.jsonl")
    task.write_jsonl(itertools.islice(plain_pairs(1), 12), directory / "heldout.jsonl")
    return directory


def plain_pairs(seed: int):
    """Worked answers before guesses: what a few steps on random weights learn."""
    worked, guessed = task.Mixture(1.0, terse=0.0, careless=0.0), task.Mixture(1.0, terse=1.0, guessed=1.0)
    sides = zip(task.demonstrations(seed, worked), task.demonstrations(seed, guessed), strict=True)
    return ({"chosen": right["messages"], "rejected": wrong["messages"]} for right, wrong in sides)


def settings(material: Path, run_dir: Path, **sections) -> DpoSettings:
    values = {
        "run_dir": str(run_dir),
        "model": {"path": str(material / "model"), "dtype": "fp32"},
        "data": {"train": str(material / "pairs.jsonl"), "max_length": 256, "pack_length": 1024, "workers": 1},
        "heldout": {"data": str(material / "heldout.jsonl"), "every": 2, "batch": 5},
        "train": {"steps": STEPS, "global_batch": 8},
        "optim": {"lr": 1e-3, "eps": 1e-6},
        "checkpoint": {"every": 2, "export": False},
    }
    for name, section in sections.items():
        values[name] = {**values.get(name, {}), **section}
    return DpoSettings.model_validate(values)


def dpo(wanted: DpoSettings, part: int = reference_cache.PART) -> None:
    reference_cache.PART = part
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    run(wanted, World(rank, size, rank, size, size // wanted.parallel.model_parallel))


def ran(wanted: DpoSettings) -> list[dict]:
    check.ready(wanted)
    parallel = wanted.parallel
    world.run(parallel.model_parallel * (parallel.data or 1), dpo, wanted)
    return rows(wanted)


def rows(wanted: DpoSettings) -> list[dict]:
    file = Path(wanted.run_dir) / "metrics.jsonl"
    found = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return [row for row in found if row["step"]]


def before(wanted: DpoSettings) -> dict:
    """The line of step 0."""
    return json.loads((Path(wanted.run_dir) / "metrics.jsonl").read_text().splitlines()[0])


@pytest.fixture(scope="module")
def undisturbed(material, tmp_path_factory):
    wanted = settings(material, tmp_path_factory.mktemp("runs") / "one")
    return wanted, ran(wanted)


@pytest.mark.parametrize("layout", [{}, {"tensor": 2}, {"context": 2}], ids=str)
def test_the_first_step_is_at_the_reference_and_layouts_agree(material, undisturbed, tmp_path, layout):
    wanted = settings(material, tmp_path / "run", parallel=layout) if layout else undisturbed[0]
    found = ran(wanted) if layout else undisturbed[1]
    untrained = before(wanted)
    assert untrained["step"] == 0 and untrained["heldout_loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert untrained["heldout_kl"] == pytest.approx(0, abs=1e-6) and "loss" not in untrained
    assert found[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert found[0]["margin"] == pytest.approx(0, abs=1e-6)
    assert [row["step"] for row in found] == list(range(1, STEPS + 1))
    assert found[-1]["loss"] < 0.5  # it learns
    for row, same in zip(found, undisturbed[1], strict=True):
        assert row["loss"] == pytest.approx(same["loss"], rel=1e-4)
        assert row["sequences"] == 16
    evaluated = [row["step"] for row in found if "heldout_loss" in row]
    assert evaluated == [2, 4, 5]
    assert found[-1]["heldout_accuracy"] == pytest.approx(undisturbed[1][-1]["heldout_accuracy"], abs=0.1)


@pytest.mark.parametrize(
    ("loss", "at_reference", "off"), [("dpo_norm", math.log(2), 0.02), ("ipo", 25.0, 2.6), ("apo_zero", 1.0, 0.05)]
)
def test_bf16_starts_at_the_reference(material, tmp_path, loss, at_reference, off):
    own = {"model": {"dtype": "bf16"}, "train": {"steps": 1}, "parallel": {"tensor": 2}, "preference": {"loss": loss}}
    (first, *_) = ran(settings(material, tmp_path / "run", **own))
    assert first["loss"] == pytest.approx(at_reference, abs=off)


def test_a_loss_without_a_reference_scores_none(material, tmp_path):
    found = ran(settings(material, tmp_path / "run", preference={"loss": "orpo"}))
    assert not (tmp_path / "run/reference").exists()
    assert found[-1]["loss"] < found[0]["loss"] and not any("kl" in row for row in found)  # from what?


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("loss", ["dpo", "dpo_norm", "ipo", "apo_zero"])
def test_what_rounding_adds_to_the_first_loss_is_let_pass_and_no_more(material, tmp_path, loss, dtype):
    """Pairs whose difference is as far from 0 as rounding may take it, by the loss's own formula, and 5% farther."""
    wanted = settings(material, tmp_path, model={"dtype": dtype}, preference={"loss": loss})
    objective = PreferenceObjective.of(wanted.preference)
    beta, roundoff = objective.loss.beta, {"fp32": 2.0**-24, "bf16": 2.0**-8}[dtype]
    most = 2 * 2**5 * roundoff * (256 if loss in ("dpo", "apo_zero") else 1)

    def first(d: float) -> BatchLoss:
        value = (d - 1 / (2 * beta)) ** 2 if loss == "ipo" else math.log1p(math.exp(-beta * d))
        if loss == "apo_zero":  # each side has half of the difference
            value = 2 / (1 + math.exp(beta * d / 2))
        return BatchLoss(value, 8, {"margin": beta * d})

    for d in (-most, most):
        check_first_loss(wanted, objective, first(0.999 * d))
        with pytest.raises(UserError, match="the mean margin is"):
            check_first_loss(wanted, objective, first(1.05 * d))
    if loss == "ipo":  # a loss that is off although margins are 0
        with pytest.raises(UserError, match="the loss is"):
            check_first_loss(wanted, objective, BatchLoss(first(-1.05 * most).loss, 8, {"margin": 0.0}))


def test_cache_is_filled_in_a_job_of_its_own_under_another_layout_and_reused(material, undisturbed, tmp_path):
    shared = {"cache": str(tmp_path / "cache")}
    assert ran(settings(material, tmp_path / "fill", parallel={"pipeline": 2}, reference={**shared, "only": True})) == []
    files = sorted((tmp_path / "cache").rglob("*.safetensors"))
    assert len(files) == 2  # pairs to train on, pairs to evaluate on
    before = [(file.stat().st_mtime_ns, file.stat().st_ino) for file in files]
    found = ran(settings(material, tmp_path / "run", reference=shared))
    assert [(file.stat().st_mtime_ns, file.stat().st_ino) for file in files] == before
    assert found[0]["margin"] == pytest.approx(0, abs=1e-5)
    assert found[-1]["loss"] == pytest.approx(undisturbed[1][-1]["loss"], rel=1e-4)
    assert not (tmp_path / "run" / "reference").exists()


@pytest.mark.parametrize("harm", ["removed", "cut", "of other content", "not a number"])
def test_what_a_cache_lacks_is_scored_with_the_initial_weights_on_resume(material, undisturbed, tmp_path, harm):
    """A rebuilt reference that came from trained weights would pass unnoticed: log 2 again."""
    wanted = settings(material, tmp_path / "run")
    shutil.copytree(undisturbed[0].run_dir, wanted.run_dir, symlinks=True)
    shutil.rmtree(Path(wanted.run_dir) / "checkpoints" / f"step_{STEPS:08d}")  # goes on after step 4, with trained weights
    caches = sorted((Path(wanted.run_dir) / "reference").glob("*/*.safetensors"), key=lambda file: file.stat().st_size)
    file = caches[-1]
    want, key = reference_cache.ReferenceCache(file.parent, _key(file), 80).values(), _key(file)
    if harm == "removed":
        file.unlink()
    elif harm == "cut":
        file.write_bytes(file.read_bytes()[:-8])
    else:
        cache = reference_cache.ReferenceCache(file.parent, "another" if harm == "of other content" else key, 80)
        cache.write(range(80), np.full(80, np.nan if harm == "not a number" else 1.0))
    found = ran(wanted)
    np.testing.assert_allclose(reference_cache.ReferenceCache(file.parent, key, 80).values(), want, atol=1e-4)
    assert found[-1]["loss"] == pytest.approx(undisturbed[1][-1]["loss"], rel=1e-5)


def _key(file: Path) -> str:
    from safetensors import safe_open

    with safe_open(file, framework="numpy") as opened:
        return opened.metadata()["key"]


def test_another_model_or_other_data_has_another_cache(material, tmp_path):
    shared = {"cache": str(tmp_path / "cache"), "only": True}
    for number, sections in enumerate(({}, {"model": {"path": str(material / "other")}}, {"data": {"max_length": 40}})):
        ran(settings(material, tmp_path / str(number), reference=shared, **sections))
        assert len(list((tmp_path / "cache").iterdir())) == 2 * (number + 1)


def test_a_forward_pass_that_is_not_the_same_twice_is_refused(material, tmp_path):
    wanted = settings(material, tmp_path / "run", megatron={"hidden_dropout": 0.5})
    check.ready(wanted)
    with pytest.raises(AssertionError, match="before the first update the policy has to equal the reference"):
        world.run(1, dpo, wanted)


def _wait(ready, patience: float = 120.0) -> None:
    end = time.monotonic() + patience
    while not ready():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.02)


@pytest.mark.parametrize("moment", ["while the cache is filled", "while training"])
def test_killed_and_started_again(material, undisturbed, tmp_path, moment):
    wanted = settings(material, tmp_path / "run")
    part = 8 if moment == "while the cache is filled" else reference_cache.PART

    def start():
        check.ready(wanted)
        return world.Started(1, dpo, wanted, part)

    ranks = start()
    filled = tmp_path / "run" / "reference"
    if moment == "while the cache is filled":
        _wait(lambda: len(list(filled.glob("*/*.safetensors"))) >= 2)
    else:
        _wait(lambda: len(rows(wanted)) >= 3)
    ranks.kill()
    kept = {one: one.stat().st_ino for one in filled.glob("*/[!.]*.safetensors")}
    if moment == "while the cache is filled":
        assert not rows(wanted) and len(kept) >= 2
    start().results(timeout=200)
    assert all(one.stat().st_ino == inode for one, inode in kept.items())  # what was scored is not scored again
    for row, same in zip(rows(wanted), undisturbed[1], strict=True):
        assert row["loss"] == pytest.approx(same["loss"], rel=1e-6)


def test_a_run_of_this_directory_goes_on_only_with_its_own_loss(material, undisturbed):
    wanted, _ = undisturbed
    with pytest.raises(UserError, match=r"preference.beta was 5.0, is 2.0"):
        check.ready(wanted.model_copy(update={"preference": wanted.preference.model_copy(update={"beta": 2.0})}))


def row(chosen, rejected, question="q"):
    prompt = [{"role": "user", "content": question}]
    return {"chosen": [*prompt, {"role": "assistant", "content": chosen}],
            "rejected": [*prompt, {"role": "assistant", "content": rejected}]}  # fmt: skip


PAIR = row("a", "b")


@pytest.mark.parametrize(
    ("lines", "told"),
    [
        ([{"chosen": PAIR["chosen"]}], r"line 1: has chosen; expected chosen and rejected"),
        (
            [PAIR, PAIR | {"rejected": row("a", "b", "other")["rejected"]}],
            "line 2: the prompts of chosen and rejected differ at message 1",
        ),
        ([PAIR | {"rejected": PAIR["rejected"][1:]}], r"differ in length \(1 and 0 messages\)"),
        ([PAIR | {"rejected": PAIR["rejected"][:1]}], "rejected: no assistant message"),
        ([PAIR | {"chosen": "text"}], "chosen: messages is 'text'"),
        ([PAIR | {"chosen": [*PAIR["chosen"], PAIR["chosen"][0]]}], "chosen: the last message is the user's"),
        ([row("a", "a")], "none of the 1 rows can be used"),
    ],
)  # fmt: skip
def test_rows_that_are_no_pairs_are_told_by_line(material, tmp_path, lines, told):
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    wanted = settings(material, tmp_path / "run", data={"train": str(file)})
    with pytest.raises(UserError, match=told):
        check.ready(wanted)


def test_tables_of_pairs_are_read(material, tmp_path):
    """As preference data sets come from the hub: columns of chosen, rejected and whatever else."""
    import pyarrow
    from pyarrow import parquet

    lines = [row("a", "b") | {"prompt": "q", "score": 0.5}, row("c", "d") | {"prompt": "q", "score": 0.7}]
    file = tmp_path / "pairs.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(lines), file)
    check.ready(settings(material, tmp_path / "run", data={"train": str(file)}))
    assert len(TokenStore.open(tmp_path / "run" / "data")) == 4


@pytest.mark.parametrize("wrong", ["heldout.data", "data.train"])
def test_nothing_is_left_of_a_run_whose_data_is_not_to_be_used(material, tmp_path, wrong):
    section, key = wrong.split(".")
    wanted = settings(material, tmp_path / "run", **{section: {key if key == "data" else "train": str(tmp_path / "gone.jsonl")}})
    with pytest.raises(UserError, match=f"gone.jsonl: no such file; correct {wrong}"):
        check.ready(wanted)
    assert not (tmp_path / "run").exists()


def test_pairs_that_teach_nothing_are_counted(material, tmp_path):
    file = tmp_path / "pairs.jsonl"
    lines = [
        row("a", "b"),
        row("same", "same"),
        row("answer", "x" * 10, "long question " * 30),
        row("x" * 300 + "a", "x" * 300 + "b"),
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    wanted = settings(material, tmp_path / "run", data={"train": str(file), "max_length": 64})
    check.ready(wanted)
    store = TokenStore.open(tmp_path / "run" / "data")
    assert (len(store), store.width) == (2, 2)
    reasons = [(reject.line, reject.kind, reject.reason) for reject in store.rejects()]
    assert reasons[0] == (2, "nothing_to_learn", "chosen and rejected are the same")
    assert reasons[1][:2] == (3, "nothing_to_train") and "no trained token among the first 64" in reasons[1][2]
    assert reasons[2][:2] == (4, "nothing_to_learn") and "among the first 64 tokens" in reasons[2][2]


@pytest.mark.parametrize(
    ("sections", "told"),
    [
        ({"preference": {"loss": "ipo", "label_smoothing": 0.1}}, "ipo has none"),
        ({"preference": {"loss": "orpo", "label_smoothing": 0.1}}, "label_smoothing = 0.1: orpo has none"),
        ({"data": {"margin": "m"}}, "only reward models"),
        ({"preference": {"beta": -1.0}}, "greater than 0"),
    ],
)
def test_settings_that_contradict_each_other(material, tmp_path, sections, told):
    with pytest.raises(ValueError, match=told):
        settings(material, tmp_path, **sections)


def test_beta_is_the_loss_s_own_unless_given(material, tmp_path):
    def beta(**preference):
        return settings(material, tmp_path, preference=preference).preference.beta

    assert (beta(), beta(loss="dpo"), beta(loss="simpo"), beta(loss="dpo", beta=0.5)) == (5.0, 0.1, 2.0, 0.5)
    assert (beta(loss="ipo"), beta(loss="orpo"), beta(loss="apo_zero")) == (0.1, 0.1, 0.1)


def test_adapters_that_a_run_begins_with_are_in_its_reference(material, tmp_path):
    """Whose log-probabilities are other ones than the bare model's, and are not taken for these."""
    cache = str(tmp_path / "cache")
    lora = {"optim": {"lr": 1e-2}, "reference": {"cache": cache}, "checkpoint": {"every": 2, "export": True}}
    first = settings(material, tmp_path / "first", **lora, lora={"rank": 4}, train={"steps": 3})
    found = ran(first)
    assert found[0]["loss"] == pytest.approx(math.log(2), abs=1e-6) and found[-1]["loss"] < found[0]["loss"]
    adapter = {"adapter": str(tmp_path / "first" / "adapter")}
    then = settings(material, tmp_path / "then", **lora, lora=adapter, parallel={"tensor": 2}, train={"steps": 3})
    assert ran(then)[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert len(list(Path(cache).iterdir())) == 4  # of two references, rows to train on and held-out ones
    weights = json.loads((tmp_path / "then" / "pins.json").read_text())
    assert "lora.adapter" in json.dumps(weights)
    shutil.copy(tmp_path / "first" / "adapter" / "adapter_model.safetensors", tmp_path / "kept")
    shutil.copy(tmp_path / "then" / "adapter" / "adapter_model.safetensors", tmp_path / "first" / "adapter")
    with pytest.raises(UserError, match=r"lora\.adapter"):
        check.ready(settings(material, tmp_path / "then", **lora, lora=adapter, parallel={"tensor": 2}, train={"steps": 4}))


def test_adapters_of_another_model_are_refused(material, tmp_path):
    lora = {"checkpoint": {"every": 2, "export": True}}
    ran(settings(material, tmp_path / "run", **lora, lora={"rank": 2, "targets": ["q_proj"]}, train={"steps": 1}))
    adapter = tmp_path / "run" / "adapter"
    told = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(told | {"base_model_name_or_path": "a/b", "lora_dropout": 0.05}))
    wanted, found = settings(material, tmp_path / "then", lora={"adapter": str(adapter)}), Findings()
    found.config = json.loads((material / "model" / "config.json").read_text())
    adapters.problems(wanted, found)
    base, dropped = found.notes
    assert not found.problems and "was made for a/b" in base and "lora_dropout = 0.05" in dropped
    (adapter / "adapter_config.json").write_text(json.dumps(told | {"r": 3}))
    with pytest.raises(UserError) as error:
        check.ready(settings(material, tmp_path / "then", **lora, lora={"adapter": str(adapter)}))
    assert "adapter_config.json asks for [3, " in str(error.value)
    assert "does not belong to the model" in str(error.value)
