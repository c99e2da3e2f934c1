"""What must not spoil a run: a full disk, a torn checkpoint, losses that are not numbers."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.lib import checkpoints, jobs, world
from tulu_mega.config import OptimSettings
from tulu_mega.errors import UserError
from tulu_mega.objectives.sft import SftObjective
from tulu_mega.records import LossOutput
from tulu_mega.resilience.skipped_updates import SkippedUpdates
from tulu_mega.train import checkpoint
from tulu_mega.train.session import Session

LAYOUT = {"tensor": 2}
OPTIM = OptimSettings(lr=1e-2, schedule="constant", warmup=0.0)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = str(tmp_path_factory.mktemp("faults") / "model")
    world.run(1, jobs.make_model, directory, False)
    return directory


def digest(made: Session) -> str:
    """Of everything an optimizer step may change on this rank."""
    tensors = [parameter for chunk in made.engine.chunks for parameter in chunk.parameters()]
    tensors += made.engine.optimizer_parameters()
    tensors += [value for state in made.engine.optimizer.optimizer.state.values() for value in state.values()]
    parts = [torch.as_tensor(tensor).detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes() for tensor in tensors]
    return hashlib.sha256(b"".join(parts)).hexdigest()


def train(made: Session, steps: range, objective=None) -> list[float]:
    losses = []
    for step in steps:
        batch = jobs.share(made, jobs.sequences(made.engine.hf.vocab_size, seed=step), None)
        loss = made.engine.forward_backward(batch, objective or SftObjective("sum"))
        made.engine.optimizer_step(step, loss.loss)
        losses.append(loss.loss)
    return losses


def save(made: Session, directory: Path, step: int, keep: int = 2) -> None:
    checkpoints.save(made.engine, directory, step, {"skipped": 0, "skipped_in_a_row": 0}, keep)


def names(directory: Path) -> list[str]:
    return sorted(each.name for each in directory.iterdir())


@contextlib.contextmanager
def file_size_limit(nbytes: int) -> Iterator[None]:
    """Files of this process cannot grow beyond: writing ends with an error half-way, as on a full disk."""
    import resource
    import signal

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    _soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))


def no_room(*_arguments: Any, **_named: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@contextlib.contextmanager
def fault(kind: str, rank: int) -> Iterator[None]:
    """One rank's writing fails: its tensors half-way, or rank 0's small files, at their beginning."""
    with contextlib.ExitStack() as stack:
        if os.environ["RANK"] == str(rank):
            if kind == "tensors":
                stack.enter_context(file_size_limit(20_000))
            else:
                patch = stack.enter_context(pytest.MonkeyPatch.context())
                patch.setattr({"common": torch, "manifest": json}[kind], {"common": "save", "manifest": "dumps"}[kind], no_room)
        yield


FAULTS = [("tensors", 0), ("tensors", 1), ("common", 0), ("manifest", 0)]
TELLING = {"tensors": "File too large", "common": "No space left on device", "manifest": "No space left on device"}


def save_with_faults(source: str, directory: Path) -> dict[str, Any]:
    """A good save, one bad save of each kind, and what is left; then the old checkpoint is loaded into a changed model."""
    with jobs.session(source, LAYOUT) as made:
        made.engine.prepare_training(OPTIM, 10)
        train(made, range(1))
        save(made, directory, 1)
        saved = digest(made)
        train(made, range(1, 2))
        seen = []
        for kind, rank in FAULTS:
            with fault(kind, rank), pytest.raises(UserError) as caught:
                save(made, directory, 2)
            seen.append((caught.value.problems, names(directory), [c.step for c in checkpoint.find(directory)]))
        changed = digest(made) != saved
        checkpoint.restore({"model": made.engine}, checkpoint.find(directory)[-1])
        restored = digest(made) == saved
        train(made, range(1, 2))
        save(made, directory, 2)  # there is room again
        return {"seen": seen, "changed": changed, "restored": restored, "steps": [c.step for c in checkpoint.find(directory)]}


def test_a_failed_save_fails_on_every_rank_and_keeps_the_checkpoint_before(model, tmp_path):
    directory = tmp_path / "checkpoints"
    for told in world.run(2, save_with_faults, model, directory, timeout=120):
        for (kind, _rank), (problems, left, steps) in zip(FAULTS, told["seen"], strict=True):
            (problem,) = problems
            assert problem.startswith(f"checkpoint of step 2 could not be written to {directory}: ")
            assert TELLING[kind] in problem, (kind, problem)
            assert left == ["step_00000001"] and steps == [1]
        assert told["changed"] and told["restored"] and told["steps"] == [1, 2]


def export_with_faults(source: str, directory: Path) -> list[tuple[list[str], list[str], str]]:
    with jobs.session(source, LAYOUT) as made:
        made.export(directory, torch.float32, {})
        before = hashlib.sha256((directory / "model.safetensors").read_bytes()).hexdigest()
        seen = []
        for limit in (20_000, 100):  # the weights, then the small files too
            on_rank_0 = file_size_limit(limit) if made.lead else contextlib.nullcontext()
            with on_rank_0, pytest.raises(UserError) as caught:
                made.export(directory, torch.bfloat16, {})
            after = hashlib.sha256((directory / "model.safetensors").read_bytes()).hexdigest()
            seen.append((caught.value.problems, names(directory.parent), "kept" if after == before else "lost"))
            dist.barrier()  # the other rank has looked too before the next one begins
        return seen


def test_a_failed_export_fails_on_every_rank_and_keeps_the_model_before(model, tmp_path):
    for seen in world.run(2, export_with_faults, model, tmp_path / "hf", timeout=120):
        for problems, left, old in seen:
            assert problems == [f"the model could not be written to {tmp_path / 'hf'}: File too large"]
            assert left == ["hf"] and old == "kept"


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 8 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(place)], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"mounting a small file system is not permitted here: {mounted.stderr.strip()}")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def fill(source: str, disk: Path) -> tuple[list[str], list[str], list[int], list[str]]:
    directory = disk / "checkpoints"
    with jobs.session(source, LAYOUT) as made:
        made.engine.prepare_training(OPTIM, 10)
        train(made, range(1))
        save(made, directory, 1)
        if made.lead:  # what is left does not hold another
            free = os.statvfs(disk)
            (disk / "ballast").write_bytes(bytes(max(0, free.f_bavail * free.f_frsize - 200_000)))
        torch.distributed.barrier()
        with pytest.raises(UserError) as of_save:
            save(made, directory, 2)
        left = names(directory)
        with pytest.raises(UserError) as of_export:
            made.export(disk / "hf", torch.float32, {})
        found = checkpoint.find(directory)
        checkpoint.restore({"model": made.engine}, found[-1])
        return of_save.value.problems, left, [c.step for c in found], of_export.value.problems


def test_a_disk_that_is_full(model, small_disk):
    for of_save, left, steps, of_export in world.run(2, fill, model, small_disk, timeout=120):
        assert all("No space left on device" in problem for problem in of_save + of_export)
        assert left == ["step_00000001"] and steps == [1]
    assert names(small_disk) == ["ballast", "checkpoints"]


def save_often(source: str, directory: Path) -> dict[str, Any]:
    with jobs.session(source, LAYOUT) as made:
        made.engine.prepare_training(OPTIM, 10)
        digests = {}
        for step in range(1, 5):
            train(made, range(step - 1, step))
            save(made, directory, step, keep=3)
            digests[step] = digest(made)
        kept = [c.step for c in checkpoint.find(directory)]
        torch.distributed.barrier()
        if made.lead:
            (directory / "step_00000004/training.json").unlink()
            torn = max((directory / "step_00000003").glob("*.distcp"), key=lambda file: file.stat().st_size)
            os.truncate(torn, torn.stat().st_size - 1)
            (directory / "step_00000009.partial-0123abcd").mkdir()
        torch.distributed.barrier()
        (left,) = checkpoint.find(directory)
        checkpoint.restore({"model": made.engine}, left)
        restored = digest(made) == digests[2]
        train(made, range(2, 3))
        same = digest(made) == digests[3]  # the third step again, from the restored state
        save(made, directory, 3, keep=3)
        return {"kept": kept, "left": left.step, "restored": restored, "same": same, "names": names(directory)}


def test_so_many_are_kept_and_torn_ones_passed_over(model, tmp_path):
    for told in world.run(2, save_often, model, tmp_path / "checkpoints", timeout=120):
        assert told["kept"] == [2, 3, 4]
        assert told["left"] == 2 and told["restored"] and told["same"]
        assert not [name for name in told["names"] if "partial" in name]
    assert [c.step for c in checkpoint.find(tmp_path / "checkpoints")] == [2, 3]


def restore_another(source: str, other: str, directory: Path) -> list[str]:
    with jobs.session(other, LAYOUT) as made:
        made.engine.prepare_training(OPTIM, 10)
        with pytest.raises(UserError) as caught:
            checkpoint.restore({"model": made.engine}, checkpoint.find(directory)[-1])
        return caught.value.problems


def save_one(source: str, directory: Path) -> None:
    with jobs.session(source, LAYOUT) as made:
        made.engine.prepare_training(OPTIM, 10)
        save(made, directory, 1)


def restore_damaged(source: str, directory: Path) -> list[str]:
    with jobs.session(source, LAYOUT) as made:
        made.engine.prepare_training(OPTIM, 10)
        with pytest.raises(UserError) as caught:
            checkpoint.restore({"model": made.engine}, checkpoint.find(directory)[-1])
        return caught.value.problems


def test_another_models_checkpoint_is_refused_and_a_damaged_one_named(model, tmp_path):
    directory, other = tmp_path / "checkpoints", str(tmp_path / "other")
    world.run(1, jobs.make_model, other, True, 501)
    world.run(2, save_one, model, directory)
    for problems in world.run(2, restore_another, model, other, directory, timeout=120):
        (problem,) = problems
        assert "is a checkpoint of another model" in problem and "vocab_size: 509 there, 501 here" in problem
    file = max((directory / "step_00000001").glob("*.distcp"), key=lambda file: file.stat().st_size)
    file.write_bytes(b"\0" * file.stat().st_size)  # as long as it should be, so only reading tells
    for problems in world.run(2, restore_damaged, model, directory, timeout=120):
        assert problems and all("could not be read; remove it to go on from the checkpoint before" in each for each in problems)


class NotANumber(SftObjective):
    """The objective, but its loss is NaN."""

    def __call__(self, logp_T: torch.Tensor, batch) -> LossOutput:
        out = super().__call__(logp_T, batch)
        return LossOutput(out.loss_sum * math.nan, out.count, out.metrics)


def skip(source: str, file: Path, infinite: bool) -> dict[str, Any]:
    with jobs.session(source, LAYOUT) as made:
        made.engine.prepare_training(OPTIM, 10)
        train(made, range(1))  # so that there are moments to spoil
        if infinite:
            with torch.no_grad():
                made.engine.optimizer_parameters()[0].view(-1)[0] = math.inf
                next(made.engine.chunks[0].parameters()).view(-1)[0] = math.inf
        before = digest(made)
        skips = SkippedUpdates(3, file)
        applied, problems = [], []
        for step in range(1, 5):
            batch = jobs.share(made, jobs.sequences(made.engine.hf.vocab_size, seed=step), None)
            loss = made.engine.forward_backward(batch, SftObjective("sum") if infinite else NotANumber("sum"))
            update = made.engine.optimizer_step(step, loss.loss)
            applied.append(update.applied)
            rows = [{"row": step, "where": f"train.jsonl line {step + 1}"}]
            try:
                skips.note(update.applied, step + 1, loss.loss, update.grad_norm, lambda rows=rows: rows, write=made.lead)
            except UserError as error:
                problems = error.problems
                break
        same = digest(made) == before
        recovers = infinite or (all(map(math.isfinite, train(made, range(5, 7)))) and digest(made) != before)
        return {"applied": applied, "same": same, "problems": problems, "total": skips.total, "recovers": recovers}


@pytest.mark.parametrize("infinite", [False, True], ids=["NaN loss", "infinite weight"])
def test_steps_that_are_not_finite_change_nothing_and_end_the_run(model, tmp_path, infinite):
    file = tmp_path / "logs/skipped.jsonl"
    for told in world.run(2, skip, model, file, infinite, timeout=120):
        assert told["applied"] == [False, False, False] and told["total"] == 3
        assert told["same"] and told["recovers"]
        (problem,) = told["problems"]
        assert problem.startswith("stopped at step 4: loss or gradient was not finite in 3 steps in a row")
        assert str(file) in problem
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [(row["step"], [each["row"] for each in row["rows"]]) for row in rows] == [(2, [1]), (3, [2]), (4, [3])]
    assert rows[0]["rows"][0]["where"] == "train.jsonl line 2"
