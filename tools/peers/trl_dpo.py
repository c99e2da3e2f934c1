"""DPO with TRL's DPOTrainer, the reference precomputed. Runs in the peers' environment; see ../bench_dpo.py.

Settings beside the pairs: `micro`, pairs a forward pass; `sort`, whether pairs of a global batch come by length.
"""

from __future__ import annotations

import json
import os
import tempfile

import torch
from datasets import Dataset
from laps import spec
from paced import Paced
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback
from trl import DPOConfig, DPOTrainer


def rows(wanted: dict) -> Dataset:
    """The pairs as words, of which the tokenizer makes a token each, in the order in which the trainer is to take them."""
    with open(wanted["pairs"], encoding="utf-8") as file:
        pairs = [json.loads(line) for line in file]
    if wanted["sort"]:
        size = wanted["batch"]
        batches = [pairs[at : at + size] for at in range(0, len(pairs), size)]
        pairs = [pair for batch in batches for pair in sorted(batch, key=_longer)]

    def words(ids: list[int]) -> str:
        return "".join(f" w{token}" for token in ids)

    made = []
    for pair in pairs:
        prompt = pair["chosen_labels"].count(-100)
        chosen, rejected = (words(pair[f"{side}_input_ids"][prompt:-1]) for side in ("chosen", "rejected"))  # eos is added again
        made.append({"prompt": words(pair["chosen_input_ids"][:prompt]), "chosen": chosen, "rejected": rejected})
    return Dataset.from_list(made)


def _longer(pair: dict) -> int:
    return -max(len(pair["chosen_input_ids"]), len(pair["rejected_input_ids"]))


def main() -> None:
    wanted = spec()
    paced = Paced(wanted["steps"])
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    with tempfile.TemporaryDirectory() as scratch:
        arguments = DPOConfig(
            output_dir=scratch,
            loss_type=["sigmoid_norm"],
            beta=wanted["beta"],
            precompute_ref_log_probs=True,
            per_device_train_batch_size=wanted["micro"],
            gradient_accumulation_steps=max(1, wanted["batch"] // wanted["micro"] // ranks),
            max_length=wanted["longest"],
            gradient_checkpointing=False,
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
        )
        trainer = DPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(wanted["model"], dtype=torch.float32),
            args=arguments,
            train_dataset=rows(wanted),
            processing_class=AutoTokenizer.from_pretrained(wanted["model"]),
            callbacks=[paced],
        )
        paced.trainer = trainer
        trainer.remove_callback(PrinterCallback)
        trainer.train()


if __name__ == "__main__":
    main()
