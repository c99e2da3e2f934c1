"""Policy objectives against TRL's own GRPOTrainer, loss and gradient norm."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch

from tulu_mega.data.batch import by_token, pack
from tulu_mega.layout.alignment import Alignment
from tulu_mega.objectives.policy import PolicyObjective
from tulu_mega.records import IGNORE, TokenizedRow, TokenOutput

ROOT = Path(__file__).parents[2]
PEERS = ROOT / ".venv-peers/bin/python"
PPO = {"loss": "grpo", "clip_low": 0.2, "clip_high": 0.2, "aggregation": "token", "beta": 0.05}
GSPO = {"loss": "gspo", "clip_low": 0.03, "clip_high": 0.04}
OURS = {
    "grpo, token": PPO | {"loss": "dapo", "clip_high": 0.28},
    "grpo, sequence": PPO | {"aggregation": "sequence"},
    "grpo, constant": PPO | {"aggregation": "constant"},
    "grpo, token, entropy": PPO | {"beta": 0.0, "entropy": 0.3},
    "cispo, token": {"loss": "cispo", "clip_low": 1.0, "clip_high": 0.28, "aggregation": "token"},
    "gspo, sequence": GSPO | {"aggregation": "sequence", "beta": 0.05},
    "gspo, token": GSPO | {"aggregation": "token"},
    "grpo, token, weights by token": PPO | {"importance": "token", "importance_cap": 1.5},
    "grpo, sequence, weights by response": PPO | {"aggregation": "sequence", "importance": "sequence", "importance_cap": 1.5},
    "grpo, token, tokens left out": PPO | {"importance": "token", "importance_cap": 1.5, "mask_above": 1.5},
}

pytestmark = [
    pytest.mark.acceptance,
    pytest.mark.skipif(not PEERS.exists(), reason="no .venv-peers; `make peers` builds it"),
]


@pytest.fixture(scope="module")
def trl(tmp_path_factory) -> tuple[Path, dict]:
    """Where the model lies, and what TRL answered."""
    directory = tmp_path_factory.mktemp("trl")
    run = subprocess.run(
        [PEERS, ROOT / "tests/lib/oracles/trl_policy_losses.py", directory],
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )
    found = [line for line in run.stdout.splitlines() if line.startswith("@")]
    assert run.returncode == 0 and found, run.stderr[-3000:]
    return directory, json.loads(found[0][1:])


@pytest.mark.parametrize("case", OURS)
def test_policy(trl, case):
    from transformers import LlamaForCausalLM

    directory, answer = trl
    model = LlamaForCausalLM.from_pretrained(directory / "policy", dtype=torch.float64)
    rows = [
        TokenizedRow(at, prompt + response, [IGNORE] * len(prompt) + response)
        for at, (prompt, response) in enumerate(answer["rows"])
    ]
    batch = pack(rows, Alignment(total=64))
    lengths = [len(response) for _, response in answer["rows"]]
    given = {f"{name}_logp_T": dict(enumerate(values)) for name, values in answer["columns"].items()}
    given["advantages_T"] = {at: [answer["advantages"][at]] * n for at, n in enumerate(lengths)}
    batch = batch.with_columns(**{name: by_token(batch, values) for name, values in given.items()})

    values_T = torch.zeros(2, len(batch.tokens_T), dtype=torch.float64)  # one sequence at a time, laid into the pack
    for row, start in zip(rows, batch.cu_seqlens_S1.tolist(), strict=False):
        ids = torch.tensor(row.input_ids)
        every = (model(ids[None]).logits[0, :-1] / answer["temperature"]).log_softmax(-1)
        both = torch.stack([every.gather(1, ids[1:, None]).squeeze(1), -(every.exp() * every).sum(-1)])
        values_T = values_T.index_copy(1, torch.arange(start, start + len(ids) - 1), both)
    values_T = values_T * batch.loss_mask_T
    objective = PolicyObjective(max_tokens=answer["max_tokens"], **OURS[case])
    out = objective(TokenOutput(values_T[0], values_T[1], batch), batch)
    (out.loss_sum / out.count).backward()
    squares = sum(parameter.grad.pow(2).sum() for parameter in model.parameters() if parameter.grad is not None)
    want = answer["answers"][case]
    assert float(out.loss_sum.detach()) / out.count == pytest.approx(want["loss"], rel=1e-5)
    assert float(squares.sqrt()) == pytest.approx(want["grad_norm"], rel=1e-5)
