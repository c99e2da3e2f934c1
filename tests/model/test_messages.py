"""Pipeline stages know the lengths of one another's messages: those that megatron-core would have them exchange."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.pipeline_parallel.schedules import deallocate_output_tensor

from tests.lib import jobs, world
from tests.lib.layouts import size
from tulu_mega.config import OptimSettings
from tulu_mega.data.batch import pack
from tulu_mega.model.messages import PackMessages
from tulu_mega.objectives.sft import SftObjective
from tulu_mega.train import engine

pytestmark = pytest.mark.ranks

LENGTHS = [33, 8, 21, 60, 14, 47, 5, 28]
"""of micro-batches, all different"""


def make_model(directory: str) -> None:
    """A Llama of twelve tiny layers."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=12, vocab_size=64, num_attention_heads=2, num_key_value_heads=2,
        max_position_embeddings=64,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(directory)


def messages(directory: str, layout: dict[str, Any], micro_batches: int) -> int:
    """Messages that this rank got while it scored and trained, each of the length that was exchanged before it."""
    got = 0

    class Exchanged(PackMessages):
        def _communicate_shapes(self, tensor_send_next, tensor_send_prev, recv_prev, recv_next):
            nonlocal got
            asked = (tensor_send_next, tensor_send_prev, recv_prev, recv_next)
            known = super()._communicate_shapes(*asked)
            told = super(PackMessages, self)._communicate_shapes(*asked)
            for comes, ours, theirs in zip((recv_prev, recv_next), known, told, strict=True):
                got += bool(comes)
                assert not comes or list(ours) == list(theirs), f"{ours} known, {theirs} told"
            return known

    with jobs.session(directory, layout) as made:
        vocab = made.engine.hf.vocab_size
        packs = [pack([one], made.align) for one in jobs.sequences(vocab, LENGTHS[:micro_batches])]
        engine.PackMessages = Exchanged
        try:
            made.engine.score(packs)
            made.engine.prepare_training(OptimSettings(), 1)
            made.engine.forward_backward(packs, SftObjective("sum"))
        finally:
            engine.PackMessages = PackMessages
    return got


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = str(tmp_path_factory.mktemp("messages") / "model")
    world.run(1, make_model, directory)
    return directory


class Begun:
    """A message that is under way."""

    waited = False

    def wait(self):
        self.waited = True


def test_what_is_sent_stays_until_it_is_waited_for(monkeypatch):
    """The schedule exchanges the output's memory for a scalar's in between."""
    handle = Begun()
    monkeypatch.setattr(P2PCommunicator, "send_forward_recv_forward", lambda *_args, **_options: (None, {"send_next": handle}))
    output = torch.ones(1000)
    memory = weakref.ref(output.untyped_storage())
    _, handles = PackMessages.send_forward_recv_forward(object.__new__(PackMessages), output, False, None, overlap_p2p_comm=True)
    deallocate_output_tensor(output, True)
    assert output.numel() == 1 and memory() is not None and memory().nbytes() == 4000
    handles["send_next"].wait()
    assert handle.waited and memory() is None


@pytest.mark.parametrize(
    ("layout", "micro_batches"),
    [
        ({"pipeline": 3}, 5),
        ({"pipeline": 2, "tensor": 2}, 1),
        ({"pipeline": 2, "virtual_pipeline": 3}, 6),
        ({"pipeline": 4, "virtual_pipeline": 3}, 8),
        ({"pipeline": 2, "virtual_pipeline": 2, "context": 2}, 2),
    ],
    ids=str,
)
def test_their_lengths_are_known(model, layout, micro_batches):
    ranks, chunks = layout["pipeline"], layout.get("virtual_pipeline", 1)
    got = world.run(size(layout), messages, model, layout, micro_batches)
    others = size(layout) // ranks
    # forward twice and backward once, from stage to stage
    assert sum(got) == 3 * micro_batches * (ranks * chunks - 1) * others
