"""GPUs that torch does not see are told of, unless they are hidden on purpose."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tulu_mega.config import SftSettings
from tulu_mega.platforms.unseen import told, unseen_gpus
from tulu_mega.preflight.check import check

DEVICES = ["/dev/nvidia0", "/dev/nvidia1"]


@pytest.mark.parametrize(
    ("shown", "cuda", "said"),
    [
        (None, None, "this machine has 2 GPU(s), and everything is computed on CPUs: torch 2.13.0 was built without CUDA"),
        (None, "13.0", "was built with CUDA 13.0 and sees none of them; look at nvidia-smi: the driver may be older"),
        ("7", "13.0", "CUDA_VISIBLE_DEVICES may name others"),
        ("0", None, "built without CUDA"),
        ("", "13.0", None),
        (" ", None, None),
        ("-1", "13.0", None),
    ],
)
def test_it_is_said_why(shown, cuda, said):
    lines = told(DEVICES, shown, cuda, "2.13.0")
    assert (len(lines) == 1 and said in lines[0]) if said else lines == []


def test_check_says_it(monkeypatch, tmp_path):
    glob = Path.glob
    given = {"model": str(tmp_path), "run_dir": str(tmp_path / "run"), "data": {"train": str(tmp_path / "rows.jsonl")}}
    for devices, sees, count in ((DEVICES, False, 1), (DEVICES, True, 0), ([], False, 0)):
        found = [Path(device) for device in devices]
        monkeypatch.setattr(Path, "glob", lambda self, what, found=found: found if str(self) == "/dev" else glob(self, what))
        monkeypatch.setattr(torch.cuda, "is_available", lambda sees=sees: sees)
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        assert len(unseen_gpus()) == count
        notes: list[str] = []
        check(SftSettings.model_validate(given), tell=notes.append)
        assert sum("everything is computed on CPUs" in line for line in notes) == count
