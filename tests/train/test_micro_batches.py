"""What of a micro-batch goes to the device, how often, and until when; and when garbage is collected."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from tests.lib import jobs, world
from tulu_mega import process
from tulu_mega.config import OptimSettings
from tulu_mega.data.batch import pack
from tulu_mega.layout.alignment import Alignment
from tulu_mega.objectives.sft import SftObjective
from tulu_mega.process import Collections
from tulu_mega.records import PackedBatch
from tulu_mega.train.micro_batches import EMBEDDING, LAYERS, SentOnce, needed


def batches(count: int = 3) -> list[PackedBatch]:
    made = [pack([sequence], Alignment()) for sequence in jobs.sequences(99)[:count]]
    return [one.with_columns(ref_logp_T=torch.zeros(len(one.tokens_T))) for one in made]


class Counted(PackedBatch):
    """Counts how often it is sent, and what of it."""

    sent: list

    def to(self, device, only=None):
        self.sent.append(only)
        return super().to(device, only)


def counted(batch: PackedBatch, sent: list) -> Counted:
    made = Counted(**vars(batch))
    object.__setattr__(made, "sent", sent)
    return made


def test_each_is_sent_once_for_all_chunks_and_let_go_behind_the_last():
    sent: list = []
    hosts = [counted(batch, sent) for batch in batches()]
    first, second = SentOnce(hosts, torch.device("cpu"), None, chunks=2).iterators()
    met = next(first)
    next(first)
    assert next(second) is met and len(sent) == 2
    gone = weakref.ref(met)
    del met
    assert gone() is None, "the last chunk had it"
    assert len(list(first)) == 1 and len(list(second)) == 2 and len(sent) == 3


def test_a_stage_gets_what_it_reads():
    assert needed(embeds=True, judges=True) is needed(embeds=False, judges=True) is None
    assert needed(embeds=True, judges=False) == EMBEDDING and needed(embeds=False, judges=False) == LAYERS
    (batch,) = batches(1)
    meta = torch.device("meta")
    middle, first, whole = batch.to(meta, LAYERS), batch.to(meta, EMBEDDING), batch.to(meta)

    def there(one: PackedBatch) -> set[str]:
        tensors = {**vars(one), **one.columns}
        return {name for name, value in tensors.items() if isinstance(value, torch.Tensor) and value.device == meta}

    assert there(middle) == {"positions_T", "cu_seqlens_S1"}
    assert there(first) == {"positions_T", "cu_seqlens_S1", "tokens_T"}
    assert there(whole) >= {"labels_T", "segments_T", "ref_logp_T", "rows_S"} and middle.lengths_S == batch.lengths_S


@pytest.fixture
def collected(monkeypatch):
    """The generations that were collected because somebody asked."""
    asked: list[int] = []
    monkeypatch.setattr(process.gc, "collect", lambda generation=2: asked.append(generation) or 0)
    yield asked
    assert gc.isenabled()


def test_garbage_is_collected_at_the_same_steps_and_as_before_afterwards(collected, monkeypatch):
    monkeypatch.delenv(process.PLAIN, raising=False)
    with Collections(every=4) as collections:
        assert not gc.isenabled()
        before = len(collected)
        for done in range(1, 10):
            collections.after_step(done)
        assert len(collected) - before == 2
    assert gc.isenabled()
    with pytest.raises(KeyError), Collections():
        raise KeyError
    assert gc.isenabled()


def test_what_is_off_stays_off_and_plain_processes_are_left_alone(collected, monkeypatch):
    monkeypatch.setenv(process.PLAIN, "1")
    with Collections(every=1) as collections:
        assert gc.isenabled()
        collections.after_step(1)
    monkeypatch.delenv(process.PLAIN)
    gc.disable()
    try:
        with Collections(every=1) as collections:
            collections.after_step(1)
        assert not gc.isenabled()
    finally:
        gc.enable()
    assert collected == []


def leftovers(directory: str) -> list[str]:
    """Tensors among the garbage of three steps that reference counts do not free."""
    with jobs.session(directory, {"tensor": 1}, recompute="full") as made:
        made.engine.prepare_training(OptimSettings(), 3)
        batch = jobs.share(made, jobs.sequences(509), 2)
        found: list[str] = []
        for step in range(3):
            if step == 1:  # what the first makes for the others may be in cycles
                gc.collect()
                gc.disable()
                gc.set_debug(gc.DEBUG_SAVEALL)
            loss = made.engine.forward_backward(batch, SftObjective("sum"))
            made.engine.optimizer_step(step, loss)
        gc.collect()
        found = [f"{type(each).__name__} {tuple(each.shape)}" for each in gc.garbage if isinstance(each, torch.Tensor)]
        gc.set_debug(0)
        return found


@pytest.mark.ranks
def test_no_tensor_of_a_step_waits_for_a_collection(tmp_path):
    world.run(1, jobs.make_model, str(tmp_path / "model"), True)
    assert world.run(1, leftovers, str(tmp_path / "model")) == [[]]
