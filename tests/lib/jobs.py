"""What ranks do in the distributed tests; top-level functions, so that the fork server can find them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from tests.lib.checkpoints import save
from tulu_mega.bridge.fp8 import in_fp8
from tulu_mega.config import EngineSettings, OptimSettings
from tulu_mega.config.lora import LoraSettings
from tulu_mega.data.batch import pack, pack_prefix_groups
from tulu_mega.data.packing import plan_step
from tulu_mega.data.prefix_sharing import plan_prefix_groups
from tulu_mega.launch.launcher import World
from tulu_mega.objectives.sft import SftObjective
from tulu_mega.records import IGNORE, PackedBatch, TokenizedRow
from tulu_mega.train import checkpoint
from tulu_mega.train.engine_state import Format
from tulu_mega.train.scoring import flops_of
from tulu_mega.train.session import Session, opened

LENGTHS = [40, 16, 64, 9, 33, 2, 21, 50]
"""uneven, one of the shortest kind that can be trained"""


def sequences(vocab: int, lengths: list[int] = LENGTHS, seed: int = 3) -> list[TokenizedRow]:
    """Random tokens; the first third of each sequence is not trained."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for row, length in enumerate(lengths):
        ids = torch.randint(0, vocab, (length,), generator=generator).tolist()
        masked = length // 3
        made.append(TokenizedRow(row, ids, [IGNORE] * masked + ids[masked:]))
    return made


@contextlib.contextmanager
def session(
    model: str,
    layout: dict[str, Any],
    dtype: str = "fp32",
    recompute: str = "none",
    megatron: dict[str, Any] | None = None,
    reward: bool | None = None,
    seed: int = 1,
    load: bool = True,
    precision: dict[str, Any] | None = None,
    model_settings: dict[str, Any] | None = None,
    lora: LoraSettings | None = None,
) -> Iterator[Session]:
    """The engine a command would build, weights loaded by the bridge unless told otherwise."""
    settings = EngineSettings.model_validate(
        {
            "model": {"path": model, "dtype": dtype, "recompute": recompute} | (model_settings or {}),
            "parallel": layout,
            "megatron": megatron or {},
            "precision": precision or {},
        }
    )
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    world = World(rank, size, rank, size, size // settings.parallel.model_parallel)
    with opened(settings, world, seed, reward, lora=lora) as made:
        if load:
            made.load_weights()
        yield made


def share(
    made: Session, batch: list[TokenizedRow], micro_batches: int | None, capacity: int = 512, together: int = 1
) -> list[PackedBatch]:
    """This rank's packed micro-batches of a global batch, every `together` sequences that follow one another kept together."""
    place, lengths = made.topology, [len(s.input_ids) for s in batch]
    multiple = made.pipeline.multiple
    plan = plan_step(lengths, place.data, capacity, made.align, micro_batches, multiple=multiple, together=together)
    return [pack([batch[i] for i in bin_], made.align) for bin_ in plan[place.data_rank]]


def share_prefixes(made: Session, batch: list[TokenizedRow], capacity: int = 160) -> list[PackedBatch]:
    """This rank's packed micro-batches of a global batch whose sequences share what they begin with."""
    assert made.engine.whole_packs
    place, cost = made.topology, flops_of(made.engine.hf)
    plan = plan_prefix_groups(batch, place.data, capacity, made.align, cost, made.pipeline, share=True)
    packs = [pack_prefix_groups(groups, made.align) for groups in plan[place.data_rank]]
    assert any(one.key_rows_K is not None for one in packs)
    return packs


def make_model(directory: str, tied: bool, vocab: int = 509, heads: int = 8, groups: int = 4, llama3: bool = True) -> None:
    """A small Llama by transformers: a vocabulary that needs padding, grouped queries, Llama 3's RoPE scaling."""
    from transformers import LlamaConfig, LlamaForCausalLM

    rope = {
        "rope_type": "llama3", "rope_theta": 10000.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    } if llama3 else {"rope_type": "default", "rope_theta": 10000.0}  # fmt: skip
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=4, vocab_size=vocab, num_attention_heads=heads,
        num_key_value_heads=groups, max_position_embeddings=256, rope_parameters=rope, tie_word_embeddings=tied,
        initializer_range=0.1,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(directory)


def hugging_face(directory: str, reduction: str, steps: int, lr: float, trained: str | None) -> dict[str, Any]:
    """The truth: transformers and torch autograd, one unpacked sequence at a time, plain SGD.

    Returns:
        log-probs by row, loss sum, gradient norm of the first step; the losses of all; writes the trained model.
    """
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    result: dict[str, Any] = {"logp": {}, "losses": [], "norms": []}
    for step in range(steps):
        batch = sequences(model.config.vocab_size, seed=3 + step)
        model.zero_grad()
        total, tokens = torch.zeros((), dtype=torch.float64), 0
        for sequence in batch:
            ids, labels = torch.tensor(sequence.input_ids), torch.tensor(sequence.labels)
            logits = model(ids[None]).logits[0, :-1]
            logp = -F.cross_entropy(logits, ids[1:], reduction="none")
            if step == 0:
                result["logp"][sequence.row] = logp.tolist()
            trained_mask = labels[1:] != IGNORE
            total = total - logp[trained_mask].double().sum()
            tokens += int(trained_mask.sum())
        count = len(batch) if reduction == "sum" else tokens
        (total / count).backward()
        norm = torch.sqrt(sum(p.grad.double().pow(2).sum() for p in model.parameters()))
        result["losses"].append(float(total) / count)
        result["norms"].append(float(norm))
        with torch.no_grad():
            for p in model.parameters():
                p -= lr * p.grad
    if trained:
        model.save_pretrained(trained)
    return result


def engine(
    directory: str,
    layout: dict[str, Any],
    micro_batches: int | None,
    reduction: str,
    steps: int,
    lr: float,
    trained: str | None,
    recompute: str = "none",
    dtype: str = "fp32",
    megatron: dict[str, Any] | None = None,
    precision: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The same by the engine under a layout; log-probs on the rank that has them."""
    with session(directory, layout, dtype, recompute, megatron, precision=precision) as made:
        vocab = made.engine.hf.vocab_size
        batch = sequences(vocab)
        everything = [TokenizedRow(s.row, s.input_ids, s.input_ids) for s in batch]
        micro = share(made, everything, micro_batches)
        result: dict[str, Any] = {"logp": {}, "losses": [], "norms": []}
        for packed, logp in zip(micro, made.engine.score(micro), strict=False):
            for row, at in zip(packed.rows_S.tolist(), packed.cu_seqlens_S1.tolist(), strict=False):
                if row >= 0:
                    result["logp"][row] = logp[at : at + len(batch[row].input_ids) - 1].tolist()
        optim = OptimSettings(name="sgd", lr=lr, schedule="constant", warmup=0.0, clip=0.0)
        made.engine.prepare_training(optim, steps)
        for step in range(steps):
            micro = share(made, sequences(vocab, seed=3 + step), micro_batches)
            loss = made.engine.forward_backward(micro, SftObjective(reduction))
            update = made.engine.optimizer_step(step, loss.loss)
            result["losses"].append(loss.loss)
            result["norms"].append(update.grad_norm)
        if trained:
            made.export(Path(trained), torch.float32, {})
        return result


RUN = 5
"""steps of `series`"""
_ADAMW = dict(lr=2e-3, schedule="constant", warmup=0.0, eps=1e-3, weight_decay=0.1, clip=0.0)


def series(
    directory: str,
    layout: dict[str, Any],
    first: int,
    last: int,
    folder: str | None,
    out: str | None,
    dtype: str = "fp32",
    precision: dict[str, Any] | None = None,
    form: Format = "reshardable",
    moments: str = "fp32",
    optimizer: dict[str, Any] | None = None,
) -> list[tuple[float, float]]:
    """Losses and norms of steps `first` to `last` of one run; goes on from a checkpoint in the folder and leaves one there."""
    with session(directory, layout, dtype, precision=precision) as made:
        engine = made.engine
        engine.prepare_training(OptimSettings(**_ADAMW, moments=moments), RUN, None, optimizer)
        if layout.get("overlap_grad_reduce"):
            assert all(ddp.ddp_config.overlap_grad_reduce for ddp in engine.ddp)
            assert all(ddp.use_forward_hook == layout["overlap_param_gather"] for ddp in engine.ddp)
            if layout.get("bucket_size") and made.topology.first_stage:
                assert len(engine.ddp[0].bucket_groups) > 3
        kept_in_fp8 = any(map(in_fp8, engine.chunks[0].parameters()))
        assert kept_in_fp8 == engine.settings.precision.fp8_param_gather
        if folder and first:
            checkpoint.restore({"model": engine}, checkpoint.find(Path(folder))[-1])
        seen = []
        for step in range(first, last):
            batch = share(made, sequences(engine.hf.vocab_size, seed=3 + step), 2)
            loss = engine.forward_backward(batch, SftObjective("sum"))
            seen.append((loss.loss, engine.optimizer_step(step, loss.loss).grad_norm))
        if folder:
            save(engine, Path(folder), last, {}, keep=9, format=form)
        if out:
            made.export(Path(out), torch.float32, {})
        return seen
