"""Pair objectives against TRL's own trainers (DPO, CPO, ORPO, Reward): loss and gradient norm."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch

from tulu_mega.config import PreferenceSettings
from tulu_mega.data.batch import pack
from tulu_mega.layout.alignment import Alignment
from tulu_mega.objectives.preference_objective import PreferenceObjective
from tulu_mega.objectives.reward import RewardObjective
from tulu_mega.records import IGNORE, PackedBatch, TokenizedRow

ROOT = Path(__file__).parents[2]
PEERS = ROOT / ".venv-peers/bin/python"
OURS = {
    "dpo": {"loss": "dpo", "beta": 0.1},
    "dpo_norm": {"loss": "dpo_norm", "beta": 5.0},
    "ipo": {"loss": "ipo", "beta": 0.3},
    "apo_zero": {"loss": "apo_zero", "beta": 0.1},
    "dpo with SFT term": {"loss": "dpo", "beta": 0.1, "sft_weight": 0.7},
    "simpo": {"loss": "simpo", "beta": 2.0, "gamma_beta_ratio": 0.3},
    "simpo, labels smoothed": {"loss": "simpo", "beta": 2.0, "gamma_beta_ratio": 0.3, "label_smoothing": 0.2},
    "dpo without reference, labels smoothed": {"loss": "dpo", "beta": 0.1, "label_smoothing": 0.2},
    "orpo, odds ratio": {"loss": "orpo", "beta": 0.4},
}

pytestmark = [
    pytest.mark.acceptance,
    pytest.mark.skipif(not PEERS.exists(), reason="no .venv-peers; `make peers` builds it"),
]


@pytest.fixture(scope="module")
def trl(tmp_path_factory) -> tuple[Path, dict]:
    """Where the models lie, and what TRL answered."""
    directory = tmp_path_factory.mktemp("trl")
    run = subprocess.run(
        [PEERS, ROOT / "tests/lib/oracles/trl_losses.py", directory],
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )
    found = [line for line in run.stdout.splitlines() if line.startswith("@")]
    assert run.returncode == 0 and found, run.stderr[-3000:]
    return directory, json.loads(found[0][1:])


def sequences(pairs: list[dict]) -> list[TokenizedRow]:
    sides = [(pair["prompt_ids"], pair[f"{side}_ids"]) for pair in pairs for side in ("chosen", "rejected")]
    return [TokenizedRow(row, ids + more, [IGNORE] * len(ids) + more) for row, (ids, more) in enumerate(sides)]


def response_logp(model: torch.nn.Module, rows: list[TokenizedRow]) -> torch.Tensor:
    """Sum over each response, one sequence at a time."""
    sums = []
    for row in rows:
        ids, labels = torch.tensor(row.input_ids), torch.tensor(row.labels)
        logp = model(ids[None]).logits[0, :-1].log_softmax(-1).gather(1, ids[1:, None]).squeeze(1)
        sums.append(logp[labels[1:] != IGNORE].sum())
    return torch.stack(sums)


def compare(model: torch.nn.Module, loss: torch.Tensor, want: dict[str, float]) -> None:
    loss.backward()
    squares = sum(parameter.grad.pow(2).sum() for parameter in model.parameters() if parameter.grad is not None)
    assert float(loss.detach()) == pytest.approx(want["loss"], rel=1e-5)
    assert float(squares.sqrt()) == pytest.approx(want["grad_norm"], rel=1e-5)


def packed(pairs: list[dict]) -> PackedBatch:
    return pack(sequences(pairs), Alignment(total=256))


@pytest.mark.parametrize("case", OURS)
def test_preference(trl, case):
    from transformers import LlamaForCausalLM

    directory, answer = trl
    pairs = answer["pairs"][:1] if "SFT" in case else answer["pairs"]
    batch, rows = packed(pairs), sequences(pairs)
    policy, reference = (
        LlamaForCausalLM.from_pretrained(directory / name, dtype=torch.float64) for name in ("policy", "reference")
    )
    padding = torch.zeros(len(batch.rows_S) - len(rows), dtype=torch.float64)
    if "without reference" in case:
        of_reference = torch.zeros(len(rows), dtype=torch.float64)
    else:
        with torch.no_grad():
            of_reference = response_logp(reference, rows)
    batch = batch.with_columns(ref_logp_S=torch.cat((of_reference, padding)))
    logp = response_logp(policy, rows)
    out = PreferenceObjective.of(PreferenceSettings(**OURS[case]))(torch.cat((logp, padding)), batch)
    loss = out.loss_sum / out.count
    if "odds ratio" in case:
        loss = loss + (logp / batch.trained_S[: len(rows)])[::2].mean()
    compare(policy, loss, answer["answers"][case])


@pytest.mark.parametrize("case", ["reward", "reward with margins"])
def test_reward(trl, case):
    from transformers import LlamaForSequenceClassification

    directory, answer = trl
    batch, rows = packed(answer["pairs"]), sequences(answer["pairs"])
    model = LlamaForSequenceClassification.from_pretrained(directory / "scorer", dtype=torch.float64)
    padding = torch.zeros(len(batch.rows_S) - len(rows), dtype=torch.float64)
    # one sequence at a time, the score at its last token
    scores = [model(torch.tensor(row.input_ids)[None]).logits.squeeze() for row in rows]
    if "margins" in case:
        margins = torch.tensor(answer["margins"], dtype=torch.float64).repeat_interleave(2)
        batch = batch.with_columns(margin_S=torch.cat((margins, padding)))
    out = RewardObjective()(torch.cat((torch.stack(scores), padding)), batch)
    compare(model, out.loss_sum / out.count, answer["answers"][case])
