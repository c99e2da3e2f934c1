"""SFT with transformers and torch alone: packed rows, kept apart by their position ids, in a loop of twenty lines.

Runs in the peers' environment; see ../bench_sft.py.
"""

from __future__ import annotations

import json
import os
from itertools import chain

import torch
import torch.distributed as dist
from laps import Laps, spec
from transformers import AutoModelForCausalLM


def best_fit(lengths: list[int], room: int) -> list[list[int]]:
    """Few rows: longest first, each into the fullest row that still takes it."""
    rows: list[list[int]] = []
    left: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        fitting = [at for at, space in enumerate(left) if space >= lengths[index]]
        at = min(fitting, key=left.__getitem__) if fitting else len(rows)
        if at == len(rows):
            rows.append([])
            left.append(room)
        rows[at].append(index)
        left[at] -= lengths[index]
    return rows


def packed(batch: list[dict], members: list[int]) -> dict[str, torch.Tensor]:
    """One row, [1, T]. The model shifts labels itself: the first of each sequence must not be predicted by its neighbour."""
    ids = [batch[index]["input_ids"] for index in members]
    labels = [[-100, *batch[index]["labels"][1:]] for index in members]
    return {
        "input_ids": torch.tensor([list(chain(*ids))]),
        "labels": torch.tensor([list(chain(*labels))]),
        "position_ids": torch.cat([torch.arange(len(each)) for each in ids])[None],
    }


def main() -> None:
    wanted, laps = spec(), Laps()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    model = AutoModelForCausalLM.from_pretrained(wanted["model"], dtype=torch.float32, attn_implementation="sdpa")
    model.train()
    model.config.use_cache = False
    wrapped: torch.nn.Module = model
    if ranks > 1:
        dist.init_process_group("gloo")
        wrapped = torch.nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=wanted["lr"], weight_decay=0.0, fused=True)
    with open(wanted["texts"], encoding="utf-8") as file:
        texts = [json.loads(line) for line in file]
    laps.ready()
    at = 0
    while True:
        laps.begin()
        losses = []
        for _ in range(wanted["steps"]):
            batch = texts[at : at + wanted["batch"]]
            at += wanted["batch"]
            rows = best_fit([len(text["input_ids"]) for text in batch], wanted["pack"])
            count = sum(label != -100 for text in batch for label in text["labels"][1:])
            mine = rows[rank::ranks]
            total = 0.0
            for number, members in enumerate(mine):
                # DDP averages over ranks, and only in the last backward pass
                last = number == len(mine) - 1
                with wrapped.no_sync() if ranks > 1 and not last else torch.enable_grad():
                    loss = wrapped(**packed(batch, members), num_items_in_batch=count, use_cache=False).loss
                    (loss * ranks).backward()
                total += float(loss.detach())
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(total)
        laps.end(losses=_summed(losses, ranks))


def _summed(losses: list[float], ranks: int) -> list[float]:
    if ranks == 1:
        return losses
    shared = torch.tensor(losses, dtype=torch.float64)
    dist.all_reduce(shared)
    return shared.tolist()


if __name__ == "__main__":
    main()
