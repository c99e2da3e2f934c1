"""Measures what saving, going on and the export take of main memory, each rank's own, and how long.

    python tools/bench_save.py [--data 2 | --tensor 2] [--asynchronous] [--format same_layout] [--dtype fp32]

A Llama of random weights with the sizes of SmolLM2-135M unless told otherwise. A process a rank makes one optimizer step, saves,
goes on from what it saved, and writes the Hugging Face export. The kernel's own high-water mark (VmHWM, set back before each
part) gives the peak of resident memory. One JSON line, in bytes and seconds, of each part the largest over ranks:

    allowed   bytes that a save may take: 512 MiB and 12 of each element of the largest tensor that a rank holds; asynchronously
              12 more of each parameter that it holds
    save, again, resume, export    peak above what was there before, what of it stays, seconds; of saves those that training
              stood still (waited)
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

PARTS = ("save", "again", "resume", "export")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, help="where to write; a temporary one when unset")
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--hidden", type=int, default=576)
    parser.add_argument("--vocab", type=int, default=49152)
    parser.add_argument("--tensor", type=int, default=1)
    parser.add_argument("--data", type=int, default=1)
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--format", choices=("reshardable", "same_layout"), default="reshardable")
    parser.add_argument("--asynchronous", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench_save_") as made:
        options.directory = options.directory or Path(made)
        if "RANK" in os.environ:
            measured = measure(options)
            (options.directory / f"rank{os.environ['RANK']}.json").write_text(json.dumps(measured))
            os._exit(0)
        print(json.dumps(run(options)))


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Starts the ranks and puts together what they measured."""
    write_config(options)
    size = options.tensor * options.data
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    again = [sys.executable, __file__, *sys.argv[1:], "--directory", str(options.directory)]
    ranks = [
        subprocess.Popen(again, env=os.environ | {k: str(v) for k, v in (common | {"RANK": rank, "LOCAL_RANK": rank}).items()})
        for rank in range(size)
    ]
    ended = [process.wait() for process in ranks]
    if any(ended):
        sys.exit("a rank failed")
    measured = [json.loads((options.directory / f"rank{rank}.json").read_text()) for rank in range(size)]
    keys = ("tensor", "data", "dtype", "format", "asynchronous")
    result = {"bench": "save", **{key: getattr(options, key) for key in keys}}
    for name in ("parameters", "allowed"):
        result[name] = max(each[name] for each in measured)
    for part in PARTS:
        result[part] = {name: max(each[part][name] for each in measured) for name in measured[0][part]}
    return result


def write_config(options: argparse.Namespace) -> None:
    """config.json of a Llama with SmolLM2-135M's proportions; its 9 heads are 6 wider ones, which two tensor ranks divide."""
    heads = max(2, options.hidden // 96)
    (options.directory / "model").mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": options.hidden,
        "intermediate_size": options.hidden * 8 // 3,
        "num_hidden_layers": options.layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 2,
        "head_dim": options.hidden // heads,
        "vocab_size": options.vocab,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "torch_dtype": "bfloat16",
    }
    (options.directory / "model" / "config.json").write_text(json.dumps(config))


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """On a rank."""
    import torch

    from tulu_mega.config import EngineSettings, OptimSettings
    from tulu_mega.launch.launcher import World
    from tulu_mega.objectives.sft import SftObjective
    from tulu_mega.train import checkpoint
    from tulu_mega.train.saver import Saver
    from tulu_mega.train.session import opened

    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    settings = EngineSettings.model_validate(
        {
            "model": {"path": str(options.directory / "model"), "dtype": options.dtype},
            "parallel": {"tensor": options.tensor, "data": options.data},
        }
    )
    with opened(settings, World(rank, size, rank, size, options.data), seed=1) as session:
        engine = session.engine
        torch.manual_seed(0)
        with torch.no_grad():
            for chunk in engine.chunks:
                for parameter in chunk.parameters():
                    parameter.normal_(0, 0.02)
        engine.prepare_training(OptimSettings(lr=1e-4), 4)
        update(engine, SftObjective("sum"), options.vocab, 0)
        saver = Saver({"model": engine}, options.directory / "checkpoints", 2, options.format, options.asynchronous)
        waited: list[float] = []

        def save(step: int) -> None:
            began = time.perf_counter()
            saver.save(step, {})
            waited.append(time.perf_counter() - began)
            saver.finish()

        numels = [parameter.numel() for chunk in engine.chunks for parameter in chunk.parameters()]
        result = {"parameters": sum(numels)}
        result["allowed"] = 512 * 2**20 + 12 * max(numels) + (12 * sum(numels) if options.asynchronous else 0)
        result["save"] = peak_of(lambda: save(1)) | {"waited": waited[-1]}
        update(engine, SftObjective("sum"), options.vocab, 1)
        result["again"] = peak_of(lambda: save(2)) | {"waited": waited[-1]}
        found = checkpoint.find(options.directory / "checkpoints")[-1]
        result["resume"] = peak_of(lambda: checkpoint.restore({"model": engine}, found))
        kind = torch.bfloat16 if options.dtype == "bf16" else torch.float32
        result["export"] = peak_of(lambda: session.export(options.directory / "hf", kind, {}))
        return result


def update(engine: Any, objective: Any, vocab: int, step: int) -> None:
    """One optimizer step on a few random tokens."""
    import torch

    from tulu_mega.data.batch import pack
    from tulu_mega.layout.packing_rules import pack_alignment
    from tulu_mega.records import TokenizedRow

    ids = torch.randint(0, vocab, (64,)).tolist()
    batch = [pack([TokenizedRow(0, ids, ids)], pack_alignment(engine.settings))]
    engine.optimizer_step(step, engine.forward_backward(batch, objective).loss)


def peak_of(action: Callable[[], Any]) -> dict[str, float]:
    """What an action takes of this process's resident memory at its peak, keeps of it afterwards, and its seconds."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    began = time.perf_counter()
    action()
    seconds = time.perf_counter() - began
    peak = resident("VmHWM")
    return {"peak": max(0, peak - before), "stays": resident("VmRSS") - before, "seconds": round(seconds, 3)}


def resident(name: str) -> int:
    """A figure of /proc/self/status, in bytes."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(name))


if __name__ == "__main__":
    main()
