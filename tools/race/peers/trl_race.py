"""What the races of TRL's trainers share: their arguments, and laps. Runs in the peers' environment."""

from __future__ import annotations

import os
import tempfile
from typing import Any

import torch
from datasets import Dataset
from paced import Paced
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback


def run(
    trainer: type,
    arguments: type,
    wanted: dict[str, Any],
    rows: Dataset,
    forwards: float,
    paced: Paced,
    more: dict[str, Any] | None = None,
    **own: Any,
) -> None:
    """Trains on the rows in their order, in float32 on the cores, at a constant rate, a lap at a time.

    Args:
        trainer: TRL's class.
        arguments: TRL's class of its settings.
        wanted: what the race says.
        forwards: rows that an optimizer step takes, over all ranks.
        more: further arguments of the trainer.
        own: further settings.
    """
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    with tempfile.TemporaryDirectory() as scratch:
        given = arguments(
            output_dir=scratch,
            per_device_train_batch_size=wanted["micro"],
            gradient_accumulation_steps=max(1, round(forwards / wanted["micro"] / ranks)),
            train_sampling_strategy="sequential",
            learning_rate=wanted["lr"],
            lr_scheduler_type="constant",
            num_train_epochs=1,
            use_cpu=True,
            ddp_backend="gloo" if ranks > 1 else None,
            bf16=False,
            disable_tqdm=True,
            report_to="none",
            save_strategy="no",
            **own,
        )
        made = trainer(
            model=AutoModelForCausalLM.from_pretrained(wanted["model"], dtype=torch.float32),
            args=given,
            train_dataset=rows,
            processing_class=AutoTokenizer.from_pretrained(wanted["model"]),
            callbacks=[paced],
            **(more or {}),
        )
        paced.trainer = made
        made.remove_callback(PrinterCallback)
        made.train()
