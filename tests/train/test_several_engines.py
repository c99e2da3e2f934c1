"""A checkpoint of several engines is one: all of them are in it and go on from it, or it is none."""

from __future__ import annotations

import ast
import contextlib
import inspect
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from megatron.core import dist_checkpointing

from tests.lib import jobs, world
from tests.lib.layouts import size
from tulu_mega.config import OptimSettings, ParallelSettings
from tulu_mega.errors import UserError
from tulu_mega.objectives.sft import SftObjective
from tulu_mega.platforms.group_sets import state_of
from tulu_mega.train import checkpoint
from tulu_mega.train.engine import Engine
from tulu_mega.train.saver import Saver
from tulu_mega.train.sharded_save import ShardedSave

pytestmark = pytest.mark.ranks

OPTIM = dict(lr=2e-3, schedule="constant", warmup=0.0, eps=1e-3, weight_decay=0.1, clip=1.0)
STEPS = 4


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> tuple[str, str]:
    """Two models of other sizes, whose vocabularies need no padding under any layout here."""
    directory = tmp_path_factory.mktemp("models")
    for name, heads, groups, vocab in (("policy", 8, 4, 496), ("value", 4, 2, 512)):
        world.run(1, jobs.make_model, str(directory / name), True, vocab, heads, groups)
    return str(directory / "policy"), str(directory / "value")


@contextlib.contextmanager
def engines(
    models: tuple[str, str], layout: dict, of_value: dict | None = None
) -> Iterator[tuple[list[jobs.Session], dict[str, Engine]]]:
    with jobs.session(models[0], layout) as made:
        own = None if of_value is None else ParallelSettings(**of_value)
        sessions = [made, made.beside(models[1], reward=False, parallel=own)]
        both = {name: each.engine for name, each in zip(("policy", "value"), sessions, strict=True)}
        for engine in both.values():
            engine.prepare_training(OptimSettings(**OPTIM), STEPS)
        yield sessions, both


def step(sessions: list[jobs.Session], both: dict[str, Engine], number: int) -> list[float]:
    """Losses of the engines, each trained on batches of its own."""
    losses = []
    for at, (session, engine) in enumerate(zip(sessions, both.values(), strict=True)):
        batch = jobs.share(session, jobs.sequences(496, seed=10 * at + number), 4)
        loss = engine.forward_backward(batch, SftObjective("sum"))
        engine.optimizer_step(number, loss.loss)
        losses.append(loss.loss)
    return losses


def train(models, layout: dict, directory: str, first: int, last: int, options: dict) -> list[list[float]]:
    """Losses of the steps first..last, from the newest checkpoint there if first is not 0; a save after each step."""
    settings = {"format": "reshardable", "asynchronous": False, "of_value": None} | options
    with engines(models, layout, settings["of_value"]) as (made, both):
        if first:
            checkpoint.restore(both, checkpoint.find(Path(directory))[-1])
        saver = Saver(both, Path(directory), 9, settings["format"], settings["asynchronous"])
        losses = []
        for number in range(first, last):
            losses.append(step(made, both, number))
            saver.poll()
            saver.save(number + 1, {"done": number + 1})
        saver.finish()
        return losses


def only(directory: Path, steps: int) -> None:
    """Hides the checkpoints of other steps."""
    for other in directory.glob("step_*"):
        if other.name != checkpoint.step_name(steps):
            other.rename(other.with_name(f"not_{other.name}"))


@pytest.mark.parametrize(
    ("layout", "options"),
    [
        ({"tensor": 2}, {"asynchronous": True}),
        pytest.param({"data": 2}, {"asynchronous": False}, marks=pytest.mark.acceptance),
        ({"data": 2}, {"asynchronous": True, "format": "same_layout"}),
        ({"tensor": 2}, {"asynchronous": True, "of_value": {"data": 2}}),
        pytest.param({"data": 2}, {"of_value": {"pipeline": 2, "virtual_pipeline": 2}}, marks=pytest.mark.acceptance),
    ],
)
def test_both_go_on_bit_for_bit(models, tmp_path, layout, options):
    stayed = world.run(2, train, models, layout, str(tmp_path), 0, STEPS, options)[0]
    only(tmp_path, 2)
    (found,) = checkpoint.find(tmp_path)
    assert found.state == {"done": 2} and list(found.others) == ["value"]
    assert found.first.model["num_attention_heads"] == 8 and found.others["value"].model["num_attention_heads"] == 4
    assert (found.path / "value" / ".metadata").exists() and found.others["value"].path == found.path / "value"
    assert world.run(2, train, models, layout, str(tmp_path), 2, STEPS, options)[0] == stayed[2:]


def saved_again(models, layout: dict, source: str, target: str, asynchronous: bool, of_value: dict | None = None) -> None:
    """Restores under a layout and saves what is there."""
    with engines(models, layout, of_value) as (_, both):
        found = checkpoint.find(Path(source))[-1]
        checkpoint.restore(both, found)
        saver = Saver(both, Path(target), 9, "reshardable", asynchronous)
        saver.save(found.step, found.state)
        saver.finish()


@pytest.mark.parametrize(
    ("target", "asynchronous", "of_value"),
    [
        ({"pipeline": 2, "virtual_pipeline": 2}, True, {"tensor": 2}),
        pytest.param({"pipeline": 2, "virtual_pipeline": 2}, True, None, marks=pytest.mark.acceptance),
        pytest.param({"pipeline": 2}, False, None, marks=pytest.mark.acceptance),
        pytest.param({"tensor": 2}, True, None, marks=pytest.mark.acceptance),
    ],
)
def test_another_layout_has_equal_bits_of_both(models, tmp_path, target, asynchronous, of_value):
    here, there = tmp_path / "here", tmp_path / "there"
    world.run(2, train, models, {"data": 2}, str(here), 0, 2, {})
    world.run(size(target), saved_again, models, target, str(here), str(there), asynchronous, of_value)
    before, after = checkpoint.find(here)[-1], checkpoint.find(there)[-1]
    assert before.state == after.state and before.first.layout != after.first.layout
    assert (after.others["value"].layout == after.first.layout) == (of_value is None)
    for one, other in ((before.first, after.first), (before.others["value"], after.others["value"])):
        wanted, got = world.run(1, plain_tensors, str(one.path)), world.run(1, plain_tensors, str(other.path))
        assert wanted == got and any("exp_avg_sq" in name for name in wanted[0])
        assert len(wanted[0]) > 20


def what_is_in_place(layout: dict, of_value: dict) -> dict[str, object]:
    """What megatron-core's state names within and without the second layout; whether equal layouts have the same groups."""
    from megatron.core import parallel_state

    from tulu_mega.distributed import topology
    from tulu_mega.platforms import install

    platform = install()
    first = topology.start(ParallelSettings(**layout), platform, seed=1)
    before = state_of(parallel_state)
    second = topology.another(ParallelSettings(**of_value), platform)
    again = topology.another(ParallelSettings(**of_value), platform)
    sizes = {}
    with second.entered():
        inside = state_of(parallel_state)
        sizes["second"] = parallel_state.get_tensor_model_parallel_world_size(), second.tensor_group.size()
        sizes["first"] = first.tensor_group.size()  # each knows its own wherever it is asked
        with first.entered():
            sizes["within"] = parallel_state.get_tensor_model_parallel_world_size()
        with pytest.raises(ZeroDivisionError), first.entered():
            raise ZeroDivisionError
        sizes["after"] = parallel_state.get_tensor_model_parallel_world_size()
    return sizes | {
        "kept": state_of(parallel_state) == before,
        "buffer": inside["_GLOBAL_MEMORY_BUFFER"] is before["_GLOBAL_MEMORY_BUFFER"],
        "shared": again.data_context_group is second.data_context_group and again == second,
        "equal": topology.another(ParallelSettings(**layout), platform).tensor_group is first.tensor_group,
    }


def test_each_layout_has_groups_of_its_own_and_equal_ones_share_them():
    for told in world.run(2, what_is_in_place, {"tensor": 2}, {"data": 2}):
        assert told == {
            "second": (1, 1), "first": 2, "within": 2, "after": 1, "kept": True, "buffer": True, "shared": True, "equal": True,
        }  # fmt: skip


def test_all_of_megatron_cores_parallel_state_is_exchanged():
    """What a release of it might add under another kind of name would stay the first layout's."""
    from megatron.core import parallel_state

    tree = ast.parse(inspect.getsource(parallel_state))
    set_by_functions = {name for node in ast.walk(tree) if isinstance(node, ast.Global) for name in node.names}
    assert len(set_by_functions) > 40
    assert set_by_functions - state_of(parallel_state).keys() == {"_global_process_group_list"}  # all groups, to time them out


def plain_tensors(directory: str) -> dict[str, bytes]:
    """Bytes of every tensor of a distributed checkpoint."""
    torch.distributed.init_process_group("gloo")
    held = dist_checkpointing.load_plain_tensors(directory)
    tensors = {name: value for name, value in held.items() if isinstance(value, torch.Tensor) and value.ndim}
    return {name: value.contiguous().view(torch.uint8).numpy().tobytes() for name, value in tensors.items()}


def killed_between(models, directory: str, asynchronous: bool) -> None:
    """A whole save, then one that ends with the processes after the first engine's files."""
    write, count = ShardedSave.write, 0

    def counted(self: ShardedSave) -> None:
        nonlocal count
        count += 1
        if count == 4:
            os._exit(9)
        write(self)

    ShardedSave.write = counted
    train(models, {"data": 2}, directory, 0, 2, {"asynchronous": asynchronous})


@pytest.mark.parametrize("asynchronous", [pytest.param(False, marks=pytest.mark.acceptance), True])
def test_killed_between_the_engines_leaves_the_checkpoint_before(models, tmp_path, asynchronous):
    stayed = world.run(2, train, models, {"data": 2}, str(tmp_path / "stayed"), 0, 3, {})[0]
    directory = tmp_path / "killed"
    with pytest.raises(AssertionError, match="ended without an answer"):
        world.run(2, killed_between, models, str(directory), asynchronous)
    (half,) = directory.glob("step_00000002.partial-*")
    assert list(half.glob("*.distcp")) and not list((half / "value").glob("*.distcp")), "it was not killed between the engines"
    assert [found.step for found in checkpoint.find(directory)] == [1]
    assert world.run(2, train, models, {"data": 2}, str(directory), 1, 3, {})[0] == stayed[1:]
    assert sorted(path.name for path in directory.iterdir()) == [checkpoint.step_name(at) for at in (1, 2, 3)]


def failing(models, directory: str) -> dict:
    """A whole save, then one in which one rank's disk fails under the second engine's files."""
    write, count = ShardedSave.write, 0

    def counted(self: ShardedSave) -> None:
        nonlocal count
        count += 1
        if count == 4 and os.environ["RANK"] == "1":
            raise OSError(28, "No space left on device")
        write(self)

    ShardedSave.write = counted
    try:
        train(models, {"data": 2}, directory, 0, 2, {"asynchronous": True})
    except UserError as error:
        return {"problems": error.problems, "left": sorted(path.name for path in Path(directory).iterdir())}
    return {}


def test_a_failure_of_the_second_is_a_failure_of_the_save(models, tmp_path):
    for seen in world.run(2, failing, models, str(tmp_path)):
        assert len(seen["problems"]) == 1 and "No space left" in seen["problems"][0]
        assert seen["left"] == [checkpoint.step_name(1)]


def alone(models, directory: str) -> list[str]:
    """Saves the first engine alone, and what is said where two are to go on from that."""
    with engines(models, {}) as (made, both):
        step(made, both, 0)
        Saver({"policy": both["policy"]}, Path(directory), 1, "reshardable", asynchronous=False).save(1, {})
        with pytest.raises(UserError) as caught:
            checkpoint.restore(both, checkpoint.find(Path(directory))[-1])
        return caught.value.problems


def test_other_engines_are_refused_and_one_alone_is_as_it_always_was(models, tmp_path):
    ((problem,),) = world.run(1, alone, models, str(tmp_path))
    assert "is a checkpoint of one model, this run trains one model and value" in problem
    path = tmp_path / "step_00000001"
    told = json.loads((path / "training.json").read_text())
    assert list(told) == ["step", "state", "model", "layout", "format", "cut", "finite", "random", "files", "digests"]
    assert not [each for each in path.iterdir() if each.is_dir()]
