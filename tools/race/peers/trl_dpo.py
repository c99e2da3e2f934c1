"""DPO with TRL's DPOTrainer, the reference precomputed. Runs in the peers' environment; see ../bench_dpo.py.

Settings beside the pairs: `micro`, pairs a forward pass; `sort`, whether pairs of a global batch come by length.
"""

from __future__ import annotations

import json

from datasets import Dataset
from laps import spec
from paced import Paced
from trl import DPOConfig, DPOTrainer
from trl_race import run


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
    run(
        DPOTrainer,
        DPOConfig,
        wanted,
        rows(wanted),
        wanted["batch"],
        paced,
        loss_type=["sigmoid_norm"],
        beta=wanted["beta"],
        precompute_ref_log_probs=True,
        max_length=wanted["longest"],
        gradient_checkpointing=False,
    )


if __name__ == "__main__":
    main()
