"""What ranks do in the tests of packs whose sequences share prefixes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests.lib import jobs
from tulu_mega.config import OptimSettings
from tulu_mega.objectives.sft import SftObjective
from tulu_mega.records import IGNORE, TokenizedRow

PROMPTS, SAMPLES, STEPS = [9, 1, 30, 14], [4, 3, 1, 5], 3


def sequences(vocab: int, seed: int) -> list[TokenizedRow]:
    """Responses of 1 to 40 tokens to prompts of `PROMPTS` tokens, `SAMPLES` to each."""
    generator = torch.Generator().manual_seed(seed)

    def draw(count: int) -> list[int]:
        return torch.randint(0, vocab, (count,), generator=generator).tolist()

    made: list[TokenizedRow] = []
    for length, samples in zip(PROMPTS, SAMPLES, strict=True):
        prompt = draw(length)
        for _ in range(samples):
            response = draw(int(torch.randint(1, 41, (), generator=generator)))
            made.append(TokenizedRow(len(made), prompt + response, [IGNORE] * length + response))
    return made


def hugging_face(directory: str, lr: float, trained: str) -> dict[str, Any]:
    """By transformers and autograd, each sequence by itself: log-probabilities of responses, losses, norms; a trained model."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    found: dict[str, Any] = {"logp": {}, "losses": [], "norms": []}
    for step in range(STEPS):
        model.zero_grad()
        total, tokens = torch.zeros((), dtype=torch.float64), 0
        for sequence in sequences(model.config.vocab_size, step):
            ids, labels = torch.tensor(sequence.input_ids), torch.tensor(sequence.labels)
            logp = model(ids[None]).logits[0, :-1].double().log_softmax(-1).gather(1, ids[1:, None]).squeeze(1)
            logp = logp[labels[1:] != IGNORE]
            if step == 0:
                found["logp"][sequence.row] = logp.tolist()
            total, tokens = total - logp.sum(), tokens + len(logp)
        (total / tokens).backward()
        found["losses"].append(float(total.detach()) / tokens)
        found["norms"].append(float(torch.sqrt(sum(p.grad.double().pow(2).sum() for p in model.parameters()))))
        with torch.no_grad():
            for p in model.parameters():
                p -= lr * p.grad
    model.save_pretrained(trained)
    return found


def engine(directory: str, layout: dict[str, Any], lr: float, trained: str, recompute: str) -> dict[str, Any]:
    """The same by the engine, on packs that hold each prompt as seldom as can be."""
    with jobs.session(directory, layout, recompute=recompute) as made:
        vocab = made.engine.hf.vocab_size
        found: dict[str, Any] = {"logp": {}, "losses": [], "norms": []}
        packs = jobs.share_prefixes(made, sequences(vocab, 0))
        for pack, logp_T in zip(packs, made.engine.score(packs), strict=False):
            for segment, row in enumerate(pack.rows_S.tolist()):
                if row >= 0:
                    found["logp"][row] = logp_T[(pack.segments_T == segment) & pack.loss_mask_T].tolist()
        made.engine.prepare_training(OptimSettings(name="sgd", lr=lr, schedule="constant", warmup=0.0, clip=0.0), STEPS)
        for step in range(STEPS):
            loss = made.engine.forward_backward(jobs.share_prefixes(made, sequences(vocab, step)), SftObjective("token_mean"))
            found["losses"].append(loss.loss)
            found["norms"].append(made.engine.optimizer_step(step, loss.loss).grad_norm)
        made.export(Path(trained), torch.float32, {})
        return found
