"""Per-token log-probabilities of given texts, by the same forward pass that trains."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch.distributed as dist

from tulu_mega.config import ScoreSettings
from tulu_mega.data import scoring
from tulu_mega.data.batch import pack
from tulu_mega.data.cost import sequence_flops
from tulu_mega.data.packing import plan_step
from tulu_mega.launcher import World
from tulu_mega.recipes.session import Session, opened
from tulu_mega.records import PackedBatch, Sequence

_CHUNK = 1024
"""Rows scored between two writes of the output."""


def run(settings: ScoreSettings, world: World) -> None:
    """Writes a row of log-probabilities for every row of the input, in its order.

    Raises:
        UserError: on every rank, for whatever the user can mend.
    """
    with opened(settings, world, seed=0) as session:
        session.load_weights()
        if session.lead:
            _lead(session, settings)
        else:
            while sequences := _shared(None):
                _score(session, sequences, settings.pack_length)


def _lead(session: Session, settings: ScoreSettings) -> None:
    """Rank 0 reads, tokenises and writes; the others get the tokens, and nothing at the end."""
    rows = [row for _where, row in scoring.read(settings.input)]
    encode = scoring.encoder(settings, rows, session.engine.hf.vocab_size)
    partial = Path(f"{settings.output}.partial")
    with partial.open("w") as file:
        for start in range(0, len(rows), _CHUNK):
            chunk = rows[start : start + _CHUNK]
            sequences = [Sequence(number, ids, ids) for number, ids in enumerate(map(encode, chunk))]
            logprobs = _score(session, _shared(sequences), settings.pack_length)
            for sequence in sequences:
                line = _line(chunk[sequence.row], sequence.input_ids, logprobs[sequence.row])
                file.write(json.dumps(line) + "\n")
            print(f"{start + len(chunk):,} of {len(rows):,} rows scored", flush=True)
    _shared([])
    partial.replace(settings.output)


def _shared(sequences: list[Sequence] | None) -> list[Sequence]:
    """Rank 0's sequences on every rank."""
    box = [sequences]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def _score(session: Session, sequences: list[Sequence], capacity: int) -> dict[int, list[float]]:
    """Log-probabilities by row on rank 0; nothing elsewhere."""
    hf, place = session.engine.hf, session.topology
    cost = sequence_flops(hf.hidden_size, hf.intermediate_size, hf.num_hidden_layers, hf.vocab_size)
    lengths = [len(s.input_ids) for s in sequences]
    plan = plan_step(lengths, place.data, capacity, session.align, cost=cost, multiple=session.pipeline.multiple)
    micro_batches = [pack((sequences[i] for i in bin_), session.align) for bin_ in plan[place.data_rank]]
    scored = session.engine.score(micro_batches)
    mine: dict[int, list[float]] = {}
    if place.reports_loss and place.context_rank == 0:
        for batch, logp_T in zip(micro_batches, scored, strict=True):
            mine |= _by_row(batch, logp_T.tolist(), sequences)
    gathered: list[dict[int, list[float]] | None] | None = [None] * place.size if session.lead else None
    dist.gather_object(mine, gathered)
    return {row: values for part in gathered or () for row, values in part.items()}


def _by_row(batch: PackedBatch, logp: list[float], sequences: list[Sequence]) -> dict[int, list[float]]:
    """Position t of a segment holds the log-probability of its token t + 1."""
    starts = batch.cu_seqlens_S1.tolist()
    rows = batch.rows_S.tolist()
    return {row: logp[at : at + len(sequences[row].input_ids) - 1] for row, at in zip(rows, starts, strict=False) if row >= 0}


def _line(row: dict[str, Any], input_ids: list[int], logprobs: list[float]) -> dict[str, Any]:
    kept = {"id": row["id"]} if "id" in row else {}
    return {**kept, "input_ids": input_ids, "logprobs": logprobs, "sum": math.fsum(logprobs)}
