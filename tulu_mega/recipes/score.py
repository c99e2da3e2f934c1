"""Per-token log-probabilities of given texts, or a reward model's scores, by the same forward pass that trains."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from tulu_mega.bridge.adapter_fit import of_a_reward_model
from tulu_mega.config import ScoreSettings
from tulu_mega.config.lora import LoraSettings
from tulu_mega.data import score_input
from tulu_mega.distributed.collectives import from_lead
from tulu_mega.launch.launcher import World
from tulu_mega.records import PackedBatch, TokenizedRow
from tulu_mega.train.scoring import score_rows
from tulu_mega.train.session import Session, opened

_CHUNK = 1024
"""Rows scored between two writes of the output."""


def run(settings: ScoreSettings, world: World) -> None:
    """Writes a row of log-probabilities for every row of the input, in its order; a reward model's score at the last token.

    Raises:
        UserError: on every rank, for whatever the user can mend.
    """
    lora, reward = None, None
    if settings.adapter:
        lora, reward = LoraSettings(adapter=settings.adapter), of_a_reward_model(settings.adapter) or None
    with opened(settings, world, seed=0, reward=reward, lora=lora) as session:
        session.load_weights()
        if session.lead:
            _lead(session, settings)
        else:
            while sequences := from_lead(None):
                _score(session, sequences, settings.pack_length)


def _lead(session: Session, settings: ScoreSettings) -> None:
    """Rank 0 reads, tokenises and writes; the others get the tokens, and nothing at the end."""
    rows = [row for _where, row in score_input.read(settings.input)]
    encode = score_input.encoder(settings, rows, session.engine.hf.vocab_size)
    partial = Path(f"{settings.output}.partial")
    with partial.open("w") as file:
        for start in range(0, len(rows), _CHUNK):
            chunk = rows[start : start + _CHUNK]
            sequences = [TokenizedRow(number, ids, ids) for number, ids in enumerate(map(encode, chunk))]
            values = _score(session, from_lead(sequences), settings.pack_length)
            for sequence in sequences:
                line = _line(chunk[sequence.row], sequence.input_ids, values[sequence.row], session.engine.reward)
                file.write(json.dumps(line) + "\n")
            print(f"{start + len(chunk):,} of {len(rows):,} rows scored", flush=True)
    from_lead([])
    partial.replace(settings.output)


def _score(session: Session, sequences: list[TokenizedRow], capacity: int) -> dict[int, list[float]]:
    """Log-probabilities by row on rank 0, of a reward model the score alone; nothing elsewhere."""
    reward = session.engine.reward
    return score_rows(
        session.engine, sequences, capacity, lambda batch, values_T: _by_row(batch, values_T.tolist(), sequences, reward)
    )


def _by_row(batch: PackedBatch, values: list[float], sequences: list[TokenizedRow], reward: bool) -> dict[int, list[float]]:
    """Position t of a segment holds the log-probability of its token t + 1, or the score of the text up to its token t."""
    found = {}
    for row, at in zip(batch.rows_S.tolist(), batch.cu_seqlens_S1.tolist(), strict=False):
        if row >= 0:
            last = at + len(sequences[row].input_ids) - 1
            found[row] = values[last : last + 1] if reward else values[at:last]
    return found


def _line(row: dict[str, Any], input_ids: list[int], values: list[float], reward: bool) -> dict[str, Any]:
    kept = {"id": row["id"]} if "id" in row else {}
    told = {"score": values[0]} if reward else {"logprobs": values, "sum": math.fsum(values)}
    return {**kept, "input_ids": input_ids, **told}
