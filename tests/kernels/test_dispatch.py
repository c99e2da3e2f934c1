"""The rule that picks between a kernel and its reference."""

from __future__ import annotations

import importlib.util
import logging

import pytest
import torch
from tulu_kernels import dispatch

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def undecided():
    dispatch._chosen.cache_clear()
    yield
    dispatch._chosen.cache_clear()


@pytest.mark.parametrize(
    ("device", "asked", "choice"),
    [(CPU, "auto", "torch"), (CUDA, "auto", "triton"), (CUDA, "torch", "torch"), (CPU, "triton", "triton")],
)
def test_choice(device, asked, choice):
    assert dispatch.chosen("a kernel", device, asked) == choice


def test_without_triton(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert dispatch.chosen("a kernel", CUDA) == "torch"
    with pytest.raises(ValueError, match="install triton"):
        dispatch.chosen("a kernel", CUDA, "triton")


def test_logged_once(caplog):
    with caplog.at_level(logging.INFO, logger="tulu_kernels.dispatch"):
        for _ in range(3):
            dispatch.chosen("a kernel", CPU)
    assert [record.getMessage() for record in caplog.records] == ["a kernel: torch (on cpu)"]
