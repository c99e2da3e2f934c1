"""Which attention is taken where, and why; a table of situations."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
import torch

from tulu_mega.errors import UserError
from tulu_mega.model import attention_choice
from tulu_mega.model.attention_choice import Situation, choose_attention, situation

ALL = frozenset({"flash3", "flash2", "varlen"})
H100 = Situation("cuda", (9, 0), torch.bfloat16, 128, windowed=False, context=1, te_layers=True, installed=ALL)
BARE = replace(H100, te_layers=False)
SHARED = replace(H100, shares=True)
NO_PLACE = "sequences share prefixes, which Transformer Engine's attention does not support"


@pytest.fixture(autouse=True)
def undecided():
    attention_choice._choose.cache_clear()


@pytest.mark.parametrize(
    ("here", "choice", "why"),
    [
        (H100, "te", ""),
        (replace(H100, context=4), "te", ""),
        (replace(H100, windowed=True), "te", ""),
        (replace(H100, windowed=True, context=4), "flash3", "windows under context parallelism"),
        (replace(H100, windowed=True, context=4, installed=frozenset()), "sdpa", "windows under context parallelism"),
        (SHARED, "flash3", NO_PLACE),
        (replace(SHARED, installed=frozenset({"varlen"})), "varlen", NO_PLACE),
        (replace(SHARED, installed=frozenset()), "te", "a torch with varlen_attn of windows is not installed"),
        (replace(SHARED, context=2), "te", ""),
        (replace(SHARED, dtype=torch.float32), "sdpa", NO_PLACE),
        (BARE, "flash3", "layers are not Transformer Engine's"),
        (replace(BARE, installed=ALL - {"flash3"}), "flash2", "FlashAttention 3 is not installed"),
        (replace(BARE, installed=frozenset({"varlen"})), "varlen", "FlashAttention 2 is not installed"),
        (replace(BARE, installed=frozenset()), "sdpa", "a torch with varlen_attn of windows is not installed"),
        (replace(BARE, capability=(8, 0)), "flash2", "FlashAttention 3 wants compute capability 9.x, not 8.0"),
        (replace(BARE, capability=(10, 0)), "flash2", "FlashAttention 3 wants compute capability 9.x, not 10.0"),
        (replace(BARE, capability=(12, 0), installed=frozenset({"flash3", "varlen"})), "varlen", "not 12.0"),
        (replace(H100, capability=(7, 5)), "sdpa", "compute capability 7.5 is below 8.0"),
        (replace(H100, dtype=torch.float32), "sdpa", "float32: fused attention takes 16 bits"),
        (replace(H100, dtype=torch.float16), "te", ""),
        (replace(BARE, head_dim=256), "flash3", ""),
        (replace(H100, head_dim=264), "sdpa", "heads of 264 channels"),
        (replace(H100, head_dim=36), "sdpa", "heads of 36 channels"),
        (replace(H100, device="cpu", capability=None, installed=frozenset()), "sdpa", "on cpu"),
        (replace(H100, device="meta", capability=None, installed=frozenset()), "sdpa", "on meta"),
    ],
)
def test_choice_and_reason(here, choice, why, caplog):
    with caplog.at_level(logging.INFO, logger="tulu_mega.model.attention_choice"):
        assert [choose_attention(here) for _ in range(3)] == [choice] * 3
    (record,) = caplog.records  # once, not once a layer
    assert record.getMessage().startswith(f"attention: {choice}") and why in record.getMessage()


@pytest.mark.parametrize("asked", ["te", "flash3", "flash2", "varlen", "sdpa"])
def test_what_is_asked_for_is_taken(asked):
    assert choose_attention(H100, asked) == asked


@pytest.mark.parametrize(
    ("here", "asked", "why"),
    [
        (replace(H100, device="cpu", capability=None), "te", "on cpu"),
        (BARE, "te", "layers are not Transformer Engine's"),
        (replace(H100, installed=frozenset()), "flash2", "FlashAttention 2 is not installed"),
        (replace(H100, capability=(8, 9)), "flash3", "9.x, not 8.9"),
    ],
)
def test_what_cannot_be_is_refused(here, asked, why):
    with pytest.raises(UserError, match=f"model.attention = '{asked}'.*{why}.*set it to 'auto'"):
        choose_attention(here, asked)


def test_this_machine():
    here = situation(torch.device("cpu"), torch.bfloat16, 64, windowed=True, context=2, te_layers=False)
    assert here.capability is None and choose_attention(here) == "sdpa"


def test_this_torch_has_packed_attention_with_windows():
    assert "varlen" in attention_choice._installed()
