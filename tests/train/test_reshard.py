"""A run saved under one layout goes on under another as if it had stayed; saving behind training's back changes nothing."""

from __future__ import annotations

import itertools
import json
import os
import threading
from pathlib import Path

import numpy as np
import pytest

from tests.lib import jobs, world
from tests.lib.layouts import size

pytestmark = pytest.mark.ranks

STEPS, SAVED = 5, 2
# eps well above the smallest gradients: Adam otherwise turns rounding into steps of the full rate
OPTIM = dict(lr=2e-3, schedule="linear", warmup=0.2, eps=1e-3, weight_decay=0.1, clip=1.0)
LAYOUTS = {
    "TP2": {"tensor": 2},
    "PP2": {"pipeline": 2},
    "TP2xPP2": {"tensor": 2, "pipeline": 2},
    "DP2": {"data": 2},
    "CP2xDP2": {"context": 2, "data": 2},
    "PP2xVPP2": {"pipeline": 2, "virtual_pipeline": 2},
}
PAIRS = list(itertools.permutations(LAYOUTS, 2))
PAIRWISE = [  # each layout once on either side
    ("TP2", "CP2xDP2"),
    ("CP2xDP2", "TP2xPP2"),
    ("TP2xPP2", "DP2"),
    ("DP2", "PP2xVPP2"),
    ("PP2xVPP2", "PP2"),
    ("PP2", "TP2"),
]


def train(model: str, layout: dict, directory: str, first: int, last: int, every: int | None, **options) -> list[float]:
    """Losses of the steps first..last, from the newest checkpoint there if first is not 0; saves at `every`."""
    from tulu_mega.config import OptimSettings
    from tulu_mega.objectives.sft import SftObjective
    from tulu_mega.train import checkpoint
    from tulu_mega.train.saver import Saver

    settings = {"format": "reshardable", "asynchronous": False, "dtype": "fp32"} | options
    with jobs.session(model, layout, settings["dtype"]) as made:
        made.engine.prepare_training(OptimSettings(**OPTIM), STEPS)
        if first:
            checkpoint.restore({"model": made.engine}, checkpoint.find(Path(directory))[-1])
        saver = Saver({"model": made.engine}, Path(directory), 9, settings["format"], settings["asynchronous"])
        losses = []
        for step in range(first, last):
            batch = jobs.share(made, jobs.sequences(made.engine.hf.vocab_size, seed=3 + step), 4)
            loss = made.engine.forward_backward(batch, SftObjective("sum"))
            made.engine.optimizer_step(step, loss.loss)
            losses.append(loss.loss)
            saver.poll()
            if every and (step + 1) % every == 0:
                saver.save(step + 1, {"losses": losses})
        saver.finish()
        return losses


def only_saved(folder: Path) -> None:
    """Hides the checkpoints of the steps other than SAVED."""
    for other in folder.glob("step_*"):
        if other.name != f"step_{SAVED:08d}":
            other.rename(other.with_name(f"not_{other.name}"))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = str(tmp_path_factory.mktemp("reshard") / "model")
    world.run(1, jobs.make_model, directory, True)
    return directory


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    """By layout: the directory of a checkpoint after SAVED steps, and the losses of the run that stayed."""
    made: dict[str, tuple[str, list[float]]] = {}

    def get(name: str) -> tuple[str, list[float]]:
        if name not in made:
            directory = str(tmp_path_factory.mktemp(name))
            layout = LAYOUTS[name]
            made[name] = directory, world.run(size(layout), train, model, layout, directory, 0, STEPS, SAVED)[0]
            only_saved(Path(directory))  # of every second step, the first is wanted
        return made[name]

    return get


def check(model, saved, source: str, target: str) -> None:
    directory, stayed = saved(source)
    layout = LAYOUTS[target]
    losses = world.run(size(layout), train, model, layout, directory, SAVED, STEPS, None)[0]
    np.testing.assert_allclose(losses, stayed[SAVED:], rtol=1e-5)


@pytest.mark.parametrize(("source", "target"), PAIRWISE)
def test_what_was_trained_goes_on_in_another_layout(model, saved, source, target):
    check(model, saved, source, target)


@pytest.mark.acceptance
@pytest.mark.parametrize(("source", "target"), [pair for pair in PAIRS if pair not in PAIRWISE])
def test_every_layout_into_every_other(model, saved, source, target):
    check(model, saved, source, target)


def test_the_optimizers_state_matters(model, saved):
    """Without it the losses would be others: the comparison above is not of parameters alone."""
    directory, stayed = saved("TP2")
    fresh = world.run(2, without_moments, model, directory)[0]
    assert np.abs(np.array(fresh) / stayed[SAVED:] - 1).max() > 1e-4


def without_moments(model: str, directory: str) -> list[float]:
    from tulu_mega.train import checkpoint

    def restore(engines, found):
        engine = engines["model"]
        checkpoint.load_weights(engine, found.path)
        for ours in engine.optimizer.chained_optimizers:
            ours.reload_model_params()

    original, checkpoint.restore = checkpoint.restore, restore
    try:
        return train(model, LAYOUTS["TP2"], directory, SAVED, STEPS, None)
    finally:
        checkpoint.restore = original


@pytest.mark.parametrize(
    ("layout", "dtype", "format"),
    [("DP2", "bf16", "reshardable"), ("DP2", "fp32", "same_layout"), ("TP2", "bf16", "same_layout")],
)
def test_the_same_layout_goes_on_bit_for_bit(model, tmp_path, layout, dtype, format):
    parallel = LAYOUTS[layout]
    options = {"dtype": dtype, "format": format}
    run = (str(tmp_path), parallel)
    stayed = world.run(2, train_with, model, *run, 0, STEPS, SAVED, options)[0]
    only_saved(tmp_path)
    assert world.run(2, train_with, model, *run, SAVED, STEPS, None, options)[0] == stayed[SAVED:]


def train_with(model, directory, layout, first, last, every, options) -> list[float]:
    return train(model, layout, directory, first, last, every, **options)


def refused(model: str, directory: str, layout: dict) -> list[str]:
    from tulu_mega.errors import UserError

    with pytest.raises(UserError) as caught:
        train(model, layout, directory, SAVED, STEPS, None)
    return caught.value.problems


def test_the_same_layout_form_is_refused_elsewhere(model, tmp_path):
    options = {"format": "same_layout"}
    world.run(2, train_with, model, str(tmp_path), LAYOUTS["TP2"], 0, SAVED, SAVED, options)
    for problems in world.run(2, refused, model, str(tmp_path), LAYOUTS["PP2"]):
        assert "'same_layout' under TP2 x PP1 x VPP1 x CP1 x DP1, this run is TP1 x PP2" in problems[0]


OVERLAP = {"data": 2, "overlap_grad_reduce": True, "bucket_size": 5000}
CHANGES = {  # of what a run in the form of one layout may not change: before, after, what is told
    "bucket_size": (OVERLAP, {**OVERLAP, "bucket_size": 20000}, ["parallel.bucket_size was 5000, is 20000"]),
    "overlap": (
        OVERLAP,
        {"data": 2},
        ["parallel.overlap_grad_reduce was True, is False", "parallel.bucket_size was 5000, is None"],
    ),
    "distributed_optimizer": (
        {"data": 2},
        {"data": 2, "distributed_optimizer": False},
        ["parallel.distributed_optimizer was True, is False"],
    ),
    "stages": (
        {"pipeline": 2},
        {"pipeline": 2, "first_stage_layers": 1},
        ["layers by pipeline stage was [2, 2], is [1, 3]"],
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_the_same_layout_form_is_refused_where_its_buckets_changed(model, tmp_path, name):
    before, after, telling = CHANGES[name]
    world.run(2, train_with, model, str(tmp_path), before, 0, SAVED, SAVED, {"format": "same_layout"})
    for (problem,) in world.run(2, refused, model, str(tmp_path), after):
        assert all(text in problem for text in telling) and "resume as it was" in problem


def test_what_leaves_the_buckets_as_they_are_may_change(model, tmp_path):
    options = {"format": "same_layout"}
    stayed = world.run(2, train_with, model, str(tmp_path), OVERLAP, 0, STEPS, SAVED, options)[0]
    only_saved(tmp_path)
    gathering = {**OVERLAP, "overlap_param_gather": True}
    assert world.run(2, train_with, model, str(tmp_path), gathering, SAVED, STEPS, None, options)[0] == stayed[SAVED:]


def test_a_checkpoint_of_before_names_no_buckets(model, tmp_path):
    from tulu_mega.train import checkpoint

    options = {"format": "same_layout"}
    stayed = world.run(2, train_with, model, str(tmp_path), {"data": 2}, 0, STEPS, SAVED, options)[0]
    only_saved(tmp_path)
    file = tmp_path / f"step_{SAVED:08d}" / "training.json"
    manifest = json.loads(file.read_text())
    del manifest["cut"]
    file.write_text(json.dumps(manifest))
    assert [each.first.cut for each in checkpoint.find(tmp_path)] == [{}]
    assert world.run(2, train_with, model, str(tmp_path), {"data": 2}, SAVED, STEPS, None, options)[0] == stayed[SAVED:]


def test_asynchronous_saves_hold_the_moment_they_were_asked_for(model, tmp_path):
    parallel = LAYOUTS["DP2"]
    plain = world.run(2, train_with, model, str(tmp_path / "plain"), parallel, 0, STEPS, 1, {})[0]
    behind = world.run(2, train_with, model, str(tmp_path / "behind"), parallel, 0, STEPS, 1, {"asynchronous": True})[0]
    assert behind == plain
    found = sorted(path.name for path in (tmp_path / "behind").iterdir())
    assert found == [f"step_{step:08d}" for step in range(1, STEPS + 1)]
    only_saved(tmp_path / "behind")
    assert world.run(2, train_with, model, str(tmp_path / "behind"), parallel, SAVED, STEPS, None, {})[0] == plain[SAVED:]


def held_up(model: str, layout: dict, directory: str, format: str) -> tuple[bool, int, int]:
    """A step is saved twice, at once and behind training, which goes on before the second is written.

    Returns:
        whether this rank wrote the same files both times, the parameters that it holds, and the bytes that it copied before.
    """
    from tulu_mega.config import OptimSettings
    from tulu_mega.objectives.sft import SftObjective
    from tulu_mega.train import sharded_save
    from tulu_mega.train.saver import Saver

    go, write, copied = threading.Event(), sharded_save.ShardedSave.write, []
    copy = sharded_save.copy

    def counted(held):
        rounded = copy(held)
        copied.append(sum(each.data.nbytes for each in held if not each.data.is_meta))
        return rounded

    def waiting(self):
        go.wait(200)
        write(self)

    with jobs.session(model, layout) as made:
        made.engine.prepare_training(OptimSettings(**OPTIM), STEPS)

        def step(number: int) -> None:
            batch = jobs.share(made, jobs.sequences(made.engine.hf.vocab_size, seed=3 + number), 4)
            made.engine.optimizer_step(number, made.engine.forward_backward(batch, SftObjective("sum")).loss)

        step(0)
        for name, asynchronous in (("at_once", False), ("behind", True)):
            sharded_save.copy = counted
            sharded_save.ShardedSave.write = waiting if asynchronous else write
            saver = Saver({"model": made.engine}, Path(directory, name), 9, format, asynchronous)
            saver.save(1, {})
        step(1)
        step(2)
        go.set()
        saver.finish()
    pattern = f"step_00000001/__{os.environ['RANK']}_*.distcp"
    files = [{file.name: file.read_bytes() for file in Path(directory, name).glob(pattern)} for name in ("at_once", "behind")]
    return files[0] == files[1], sum(p.numel() for chunk in made.engine.chunks for p in chunk.parameters()), sum(copied)


@pytest.mark.parametrize(("format", "weights"), [("reshardable", 4 / 2), ("same_layout", 4)])
def test_what_is_written_behind_training_is_the_step_that_was_saved(model, tmp_path, format, weights):
    """Each of two data-parallel ranks copies its half of main parameters and moments, the first the weights as well, but for
    those that are the main parameters it holds."""
    ranks = world.run(2, held_up, model, LAYOUTS["DP2"], str(tmp_path), format)
    assert all(same for same, _held, _copied in ranks)
    for (_same, held, copied), each in zip(ranks, (12 / 2 + weights, 12 / 2), strict=True):
        assert copied == pytest.approx(each * held, rel=0.02)  # measured: 1.3% more, weights whose elements two ranks share


def behind_training(model: str, directory: str, fails: bool) -> dict:
    """Two saves whose writing is held up: what is there meanwhile, and afterwards."""
    from tulu_mega.config import OptimSettings
    from tulu_mega.errors import UserError
    from tulu_mega.train import checkpoint
    from tulu_mega.train.saver import Saver
    from tulu_mega.train.sharded_save import ShardedSave

    go, wrote, original = threading.Event(), [], ShardedSave.write

    def write(self):
        go.wait(200)
        if fails and os.environ["RANK"] == "1" and wrote:
            raise OSError(28, "No space left on device")
        original(self)
        wrote.append(1)

    ShardedSave.write = write
    seen = {}

    def names() -> list[str]:
        return sorted(path.name.partition(".")[0] + (".partial" if "partial" in path.name else "") for path in folder.iterdir())

    folder = Path(directory)
    with jobs.session(model, {"tensor": 2}) as made:
        made.engine.prepare_training(OptimSettings(**OPTIM), STEPS)
        saver = Saver({"model": made.engine}, folder, 9, "reshardable", asynchronous=True)
        saver.save(1, {})
        saver.poll()
        seen["under way"] = [each.step for each in checkpoint.find(folder)], names()
        threading.Timer(0.5, go.set).start()
        saver.save(2, {})  # waits for the first
        seen["second begun"] = [each.step for each in checkpoint.find(folder)]
        try:
            saver.finish()
        except UserError as error:
            seen["problems"] = error.problems
        seen["ended"] = names()
    return seen


def test_one_save_at_a_time_and_none_counts_before_it_is_whole(model, tmp_path):
    for seen in world.run(2, behind_training, model, str(tmp_path), False):
        assert seen["under way"] == ([], ["step_00000001.partial"])
        assert seen["second begun"] == [1]
        assert seen["ended"] == ["step_00000001", "step_00000002"]


def test_a_failure_behind_training_leaves_the_last_good_one(model, tmp_path):
    for seen in world.run(2, behind_training, model, str(tmp_path), True):
        assert len(seen["problems"]) == 1
        assert "step 2 could not be written" in seen["problems"][0] and "No space left" in seen["problems"][0]
        assert seen["ended"] == ["step_00000001"]
    assert json.loads((tmp_path / "step_00000001" / "training.json").read_text())["format"] == "reshardable"
