"""Small models to convert, and comparisons of what came of them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed.checkpoint
from safetensors.torch import load_file

from tulu_mega.bridge.families import family_for
from tulu_mega.bridge.files.hf_writer import ShardWriter, plan_files, tensor_info, write_index
from tulu_mega.convert.run import plan_job, run
from tulu_mega.convert.settings import ConvertSettings

TORCH = {"fp32": torch.float32, "bf16": torch.bfloat16}
SMALL = 0.00001  # GiB: some 10 kB a file


def make_source(
    directory: Path, dtype: str, tied: bool = False, hidden: int = 24, layers: int = 3, vocab: int = 61, file_bytes: int = 20_000
) -> Path:
    """A Llama of random weights in several files; the vocabulary needs padding."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": hidden * 2,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": hidden // 4 // 2 * 2,
        "vocab_size": vocab,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": tied,
        "dtype": "float32" if dtype == "fp32" else "bfloat16",
    }
    directory.mkdir(parents=True)
    shapes = family_for(config).hf_shapes(config)
    plan = plan_files([{name: tensor_info(shape, TORCH[dtype]) for name, shape in shapes.items()}], max_bytes=file_bytes)
    torch.manual_seed(5)
    with ShardWriter(directory, plan[0]) as writer:
        for name, shape in shapes.items():
            writer.add(name, torch.randn(shape).to(TORCH[dtype]))
    write_index(directory, plan)
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "tokenizer.json").write_text('{"stand": "in"}')
    return directory


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(directory.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def convert(source: Path, output: Path, to: str, **more) -> Path:
    plan_job.cache_clear()
    run(ConvertSettings(**{"source": str(source), "output": str(output), "to": to, "workers": 1, "file_gib": SMALL, **more}))
    return output


def same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype and torch.equal(ours[name], tensor), name


def command(source: Path, output: Path, to: str, *more: str) -> list[str]:
    flags = ["--source", str(source), "--output", str(output), "--to", to, "--file_gib", str(SMALL), *more]
    return [sys.executable, "-m", "tulu_mega", "convert", *flags]
