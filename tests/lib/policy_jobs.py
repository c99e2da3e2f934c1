"""What ranks do in the tests of policy objectives."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

import torch

from tests.lib import jobs
from tulu_mega.config import OptimSettings
from tulu_mega.data.batch import by_token
from tulu_mega.objectives.policy import PolicyObjective
from tulu_mega.records import IGNORE, PackedBatch, TokenizedRow
from tulu_mega.train.engine import Engine

LENGTHS = [40, 16, 64, 9, 33, 5, 21, 50, 8]
GROUPS = [(0, 1, 2), (3,), (4, 5), (6, 7, 8)]
"""rows with a prompt in common, of 5, 3, 1 and 2 tokens"""
UNTRAINED = 3
"""row of a response that is masked for its length: packed, but nothing of it is trained"""
PACK = 320
"""Tokens: holds every sequence in one, padded as any layout wants them."""
MAX_TOKENS = 48
MAX_STEPS = 1
Columns = dict[str, dict[int, list[float]]]


def sequences(vocab: int) -> list[TokenizedRow]:
    """Responses to four prompts, in groups."""
    made = jobs.sequences(vocab, LENGTHS)
    for group in GROUPS:
        prompt = made[group[0]].input_ids[: min(LENGTHS[row] for row in group) // 3]
        for row in group:
            ids = prompt + made[row].input_ids[len(prompt) :]
            made[row] = TokenizedRow(row, ids, [IGNORE] * len(prompt) + ids[len(prompt) :])
    made[UNTRAINED] = dataclasses.replace(made[UNTRAINED], labels=[IGNORE] * LENGTHS[UNTRAINED])
    return made


def columns(directory: str) -> Columns:
    """Advantages, and what other weights and another program might have given: the model's own, moved a little."""
    model, generator = _model(directory), torch.Generator().manual_seed(17)
    found: Columns = {name: {} for name in ("old_logp_T", "sampler_logp_T", "ref_logp_T", "advantages_T")}
    with torch.no_grad():
        for sequence in sequences(model.config.vocab_size):
            own, _ = _of_response(model, sequence, 1.0)
            noise = torch.randn(3, len(own), generator=generator) * torch.tensor([[0.25], [0.4], [0.3]])
            old = own.float() + noise[0]
            row = sequence.row
            found["old_logp_T"][row] = old.tolist()
            found["sampler_logp_T"][row] = (old + noise[1]).tolist()
            found["ref_logp_T"][row] = (own.float() + noise[2]).tolist()
            advantage = float(torch.randn((), generator=generator) + (1.0 if row % 2 else -0.4))
            found["advantages_T"][row] = [advantage] * len(own)
    return found


def hugging_face(directory: str, objectives: dict[str, dict[str, Any]], given: Columns) -> dict[str, tuple]:
    """By transformers and autograd, one sequence at a time, after the formulae: loss, gradient norm, metrics."""
    model, found = _model(directory), {}
    rows = [s for s in sequences(model.config.vocab_size) if s.row != UNTRAINED]
    for name, settings in objectives.items():
        model.zero_grad()
        kind, cap, mask_above = settings["loss"], settings.get("importance_cap", 2.0), settings.get("mask_above")
        level = settings.get("importance", "none")
        responses: list[torch.Tensor] = []
        seen = {key: [] for key in ("ratio", "entropy", "kl", "difference", "weight", "cut", "left", "low", "high")}
        for sequence in rows:
            old, sampler, ref, advantage = (
                torch.tensor(given[column][sequence.row], dtype=torch.float64)
                for column in ("old_logp_T", "sampler_logp_T", "ref_logp_T", "advantages_T")
            )
            logp, entropy = _of_response(model, sequence, settings.get("temperature", 1.0))
            ratio = (logp - old).exp()
            if kind == "gspo":
                ratio = ((logp - old).sum() / len(logp)).exp().expand(len(logp))
            below, above = 1 - settings["clip_low"], 1 + settings["clip_high"]
            clipped = ratio.clamp(below, above)
            if kind == "cispo":
                surrogate = clipped.detach() * advantage * logp
            else:
                surrogate = torch.min(ratio * advantage, clipped * advantage)
            mismatch = (old - sampler).exp()
            if level == "sequence":
                mismatch = (old - sampler).sum().exp().expand(len(logp))
            weight = mismatch.clamp(max=cap) if level != "none" else torch.ones_like(mismatch)
            outside = torch.zeros_like(mismatch, dtype=torch.bool)
            if mask_above is not None:
                outside = (mismatch > mask_above) | (mismatch < 1 / mask_above)
            weight = torch.where(outside, 0.0, weight)
            d = ref - logp
            divergence = {"k1": -d, "k2": d**2 / 2, "k3": d.exp() - d - 1}[settings.get("kl", "k3")]
            loss = -surrogate * weight + settings.get("beta", 0.0) * divergence - settings.get("entropy", 0.0) * entropy
            responses.append(loss)
            seen["ratio"].append(ratio)
            seen["entropy"].append(entropy)
            seen["kl"].append(divergence)
            seen["difference"].append((old - sampler).abs())
            seen["weight"].append(weight)
            seen["cut"].append((mismatch > cap).double() * (level != "none"))
            seen["left"].append(outside.double())
            if kind == "cispo":
                seen["low"].append((ratio < below).double())
                seen["high"].append((ratio > above).double())
            else:
                seen["low"].append(((ratio < below) & (advantage < 0)).double())
                seen["high"].append(((ratio > above) & (advantage > 0)).double())
        if settings["aggregation"] == "token":
            total = torch.cat(responses).mean()
        elif settings["aggregation"] == "sequence":
            total = torch.stack([loss.mean() for loss in responses]).mean()
        else:
            total = torch.stack([loss.sum() / MAX_TOKENS for loss in responses]).mean()
        total.backward()
        norm = torch.sqrt(sum(p.grad.double().pow(2).sum() for p in model.parameters()))
        whole = {key: torch.cat(values).detach() for key, values in seen.items()}
        names = {
            "ratio": "ratio", "entropy": "entropy", "sampler_difference": "difference", "importance_weight": "weight",
            "importance_cut": "cut", "importance_left_out": "left", "clip_low": "low", "clip_high": "high",
        }  # fmt: skip
        if settings.get("beta"):
            names["kl"] = "kl"
        metrics = {ours: float(whole[key].mean()) for ours, key in names.items()}
        metrics |= {"ratio_max": float(whole["ratio"].max()), "sampler_difference_max": float(whole["difference"].max())}
        count = sum(map(len, responses)) if settings["aggregation"] == "token" else len(responses)
        found[name] = float(total.detach()), float(norm), metrics, count
    return found


def engine(
    directory: str,
    layout: dict[str, Any],
    micro_batches: int | Literal["shared"] | None,
    objectives: dict[str, dict[str, Any]],
    given: Columns,
) -> dict[str, Any]:
    """The same by the engine, and the loss that `evaluate` gives; without a name, metrics of the policy before its update.

    Args:
        micro_batches: ``shared``: as many as there are, of sequences that share their prompts.
    """
    with jobs.session(directory, layout) as made:
        batch = sequences(made.engine.hf.vocab_size)
        whole = jobs.share_prefixes(made, batch) if micro_batches == "shared" else jobs.share(made, batch, micro_batches, PACK)
        micro = [_filled(one, given) for one in whole]
        made.engine.prepare_training(OptimSettings(name="sgd", lr=0.0, schedule="constant", warmup=0.0, clip=0.0), MAX_STEPS)
        found: dict[str, Any] = {}
        for name, settings in objectives.items():
            made.engine.temperature = settings.get("temperature", 1.0)
            objective = _objective(settings)
            evaluated = made.engine.evaluate(micro, objective)
            loss = made.engine.forward_backward(micro, objective)
            norm = made.engine.optimizer_step(0, loss.loss).grad_norm
            found[name] = (loss.loss, norm, loss.metrics, loss.count, evaluated.loss)
        made.engine.temperature = 0.8
        scored = made.engine.score(micro)
        if scored:
            micro = [
                one.with_columns(old_logp_T=logp, ref_logp_T=logp, sampler_logp_T=logp)
                for one, logp in zip(micro, scored, strict=True)
            ]
        settings = {"loss": "gspo", "clip_low": 3e-4, "clip_high": 4e-4, "aggregation": "sequence", "beta": 0.1}
        found[""] = made.engine.forward_backward(micro, _objective(settings | {"importance": "sequence"})).metrics
        return found


def frozen_reference(directory: str, layout: dict[str, Any]) -> dict[str, Any]:
    """A second engine beside one that trains: what it gives after an update of the first, and what it holds."""
    with jobs.session(directory, layout) as made:
        vocab = made.engine.hf.vocab_size
        given = {name: {s.row: [0.5] * _trained(s) for s in sequences(vocab)} for name in ("sampler_logp_T", "advantages_T")}
        micro = [_filled(one, given) for one in jobs.share(made, sequences(vocab), 2)]
        frozen = Engine(made.engine.hf, made.settings, made.topology, made.engine.platform)
        dataclasses.replace(made, engine=frozen).load_weights()
        made.engine.prepare_training(OptimSettings(name="sgd", lr=0.5, schedule="constant", warmup=0.0, clip=0.0), MAX_STEPS)
        before = frozen.score(micro)
        same = [a.equal(b) for a, b in zip(made.engine.score(micro), before, strict=True)]
        objective = _objective({"loss": "grpo", "clip_low": 0.2, "clip_high": 0.2, "aggregation": "token"})
        loss = made.engine.forward_backward(micro, objective)
        applied = made.engine.optimizer_step(0, loss.loss).applied
        after, policy = frozen.score(micro), made.engine.score(micro)
        parameters = [p for chunk in frozen.chunks for p in chunk.parameters()]
        return {
            "same": same,
            "applied": applied,
            "still": [a.equal(b) for a, b in zip(before, after, strict=True)],
            "moved": [not a.equal(b) for a, b in zip(policy, after, strict=True)],
            "gradients": sum(p.grad is not None or hasattr(p, "main_grad") for p in parameters),
            "training": bool(frozen.ddp or frozen.optimizer),
        }


def _objective(settings: dict[str, Any]) -> PolicyObjective:
    return PolicyObjective(max_tokens=MAX_TOKENS, **{key: value for key, value in settings.items() if key != "temperature"})


def _filled(batch: PackedBatch, given: Columns) -> PackedBatch:
    return batch.with_columns(**{name: by_token(batch, values) for name, values in given.items()})


def _trained(sequence: TokenizedRow) -> int:
    return sum(label != IGNORE for label in sequence.labels[1:])


def _model(directory: str):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)


def _of_response(model, sequence: TokenizedRow, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities of the trained tokens and entropies where they are drawn, float64."""
    ids, labels = torch.tensor(sequence.input_ids), torch.tensor(sequence.labels)
    every = (model(ids[None]).logits[0, :-1].double() / temperature).log_softmax(-1)[labels[1:] != IGNORE]
    logp = every.gather(1, ids[1:][labels[1:] != IGNORE][:, None]).squeeze(1)
    entropy = -(every.exp() * every).sum(-1)
    assert not len(entropy) or 0 < float(entropy.detach().min()) <= math.log(every.shape[-1])
    return logp, entropy
