"""What ranks do in the tests of responses of several segments."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests.lib import jobs
from tulu_mega.config import OptimSettings
from tulu_mega.objectives.policy import PolicyObjective
from tulu_mega.records import IGNORE, Response, Segment
from tulu_mega.rl.batches import TrainedResponse, packed

PROMPTS, SAMPLES = [9, 1, 30], [3, 2, 1]
TURNS = [1, 2, 3, 4, 2, 3]
"""answers in each response; between two of them a tool's output that is not trained"""
CAPACITY = 256
CLIP = 0.2


def responses(vocab: int) -> list[TrainedResponse]:
    """Responses of one to four answers to prompts of `PROMPTS` tokens; log-probabilities such that some ratios are clipped."""
    generator = torch.Generator().manual_seed(5)

    def length(most: int) -> int:
        return int(torch.randint(1, most + 1, (), generator=generator))

    def draw(count: int) -> list[int]:
        return torch.randint(0, vocab, (count,), generator=generator).tolist()

    def answer(count: int) -> Segment:
        logp = -6.5 + torch.randn(count, generator=generator)
        return Segment(draw(count), True, logp.tolist(), [0] * count)

    made: list[TrainedResponse] = []
    for prompt_length, samples in zip(PROMPTS, SAMPLES, strict=True):
        prompt = Segment(draw(prompt_length), False)
        for _ in range(samples):
            segments = [prompt, answer(length(20))]
            for _ in range(TURNS[len(made)] - 1):
                segments += [Segment(draw(length(9)), False), answer(length(12))]
            if len(made) == 4:
                segments.append(Segment(draw(5), False))  # ends with what a tool said
            advantage = float(torch.randn((), generator=generator))
            made.append(TrainedResponse(len(made), Response(tuple(segments), "stop"), advantage))
    return made


def hugging_face(directory: str, lr: float, trained: str) -> tuple[float, float, int]:
    """Loss, gradient norm and trained tokens by transformers and autograd, a response at a time; saves the model one SGD step on.

    The ratio is to the sampler's log-probabilities, as of a policy whose old weights gave these.
    """
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    losses = []
    for one in responses(model.config.vocab_size):
        ids, mask = torch.tensor(one.response.token_ids), torch.tensor(one.response.labels[1:]) != IGNORE
        logp = model(ids[None]).logits[0, :-1].double().log_softmax(-1).gather(1, ids[1:, None]).squeeze(1)[mask]
        ratio = (logp - torch.tensor(one.response.sampler_logp, dtype=torch.float32).double()).exp()
        losses.append(-torch.min(ratio * one.advantage, ratio.clamp(1 - CLIP, 1 + CLIP) * one.advantage))
    every = torch.cat(losses)
    every.mean().backward()
    norm = torch.sqrt(sum(p.grad.double().pow(2).sum() for p in model.parameters()))
    with torch.no_grad():
        for p in model.parameters():
            p -= lr * p.grad
    model.save_pretrained(trained)
    return float(every.mean().detach()), float(norm), len(every)


def engine(directory: str, layout: dict[str, Any], lr: float, trained: str, share: bool) -> tuple[float, float, int, int]:
    """The same by the engine on packs, and the tokens that sharing spared."""
    with jobs.session(directory, layout) as made:
        batch = packed(made.engine, responses(made.engine.hf.vocab_size), CAPACITY, share)
        packs = [pack.with_columns(old_logp_T=pack.column("sampler_logp_T")) for pack in batch.packs]
        made.engine.prepare_training(OptimSettings(name="sgd", lr=lr, schedule="constant", warmup=0.0, clip=0.0), 1)
        objective = PolicyObjective(loss="grpo", clip_low=CLIP, clip_high=CLIP, aggregation="token", max_tokens=64)
        loss = made.engine.forward_backward(packs, objective)
        norm = made.engine.optimizer_step(0, loss.loss).grad_norm
        made.export(Path(trained), torch.float32, {})
        return loss.loss, norm, loss.count, sum(batch.repeated)
