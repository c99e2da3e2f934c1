"""SFT with TRL's SFTTrainer, on tokens made before. Runs in the peers' environment; see ../bench_sft.py.

Settings beside the texts:

    micro        sequences (or packs) a forward pass: per_device_train_batch_size
    packing      pack length of `packing=True` (best-fit decreasing); 0 for no packing
    padding_free whether the sequences of a forward pass lie behind one another instead of being padded
    checkpoint   TRL's default, gradient checkpointing
    sort         sequences of a global batch by length, so that those padded to one length are alike
"""

from __future__ import annotations

import json

from datasets import Dataset
from laps import spec
from paced import Paced
from trl import SFTConfig, SFTTrainer
from trl_race import run


def rows(wanted: dict) -> Dataset:
    """The texts in the order in which the trainer is to take them."""
    with open(wanted["texts"], encoding="utf-8") as file:
        texts = [json.loads(line) for line in file]
    if wanted["sort"]:
        size = wanted["batch"]
        batches = [texts[at : at + size] for at in range(0, len(texts), size)]
        texts = [text for batch in batches for text in sorted(batch, key=lambda text: -len(text["input_ids"]))]
    return Dataset.from_list([{"input_ids": text["input_ids"], "labels": text["labels"]} for text in texts])


def main() -> None:
    wanted = spec()
    paced = Paced(wanted["steps"])
    data = rows(wanted)
    packs = -(-sum(map(len, data["input_ids"])) // wanted["packing"]) if wanted["packing"] else 0
    run(
        SFTTrainer,
        SFTConfig,
        wanted,
        data,
        packs * wanted["batch"] / len(data) if packs else wanted["batch"],
        paced,
        packing=bool(wanted["packing"]),
        padding_free=wanted["padding_free"],
        max_length=wanted["packing"] or (None if wanted["padding_free"] else wanted["longest"]),
        gradient_checkpointing=wanted["checkpoint"],
    )


if __name__ == "__main__":
    main()
