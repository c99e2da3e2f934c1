"""python tests/cases/stale_index.py DIRECTORY SHARDS SINGLE: which of two models is read from a directory that holds both.

DIRECTORY has SHARDS's weights in files with an index, and SINGLE's in a newer model.safetensors, which transformers reads.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tulu_mega.bridge.box import Box
from tulu_mega.bridge.files.hf_files import HfCheckpoint

KEY = "model.embed_tokens.weight"


def main(directory: str, shards: str, single: str) -> None:
    models = {name: load_file(Path(at, "model.safetensors"))[KEY] for name, at in (("shards", shards), ("single", single))}
    theirs = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).state_dict()[KEY]
    checkpoint = HfCheckpoint.open(Path(directory))
    ours = checkpoint.read_box(KEY, Box.whole(checkpoint.tensors[KEY].shape))
    for name, found in (("transformers", theirs), ("tulu_mega", ours)):
        print(name, "reads", [model for model, weight in models.items() if torch.equal(found, weight)])


if __name__ == "__main__":
    main(*sys.argv[1:])
