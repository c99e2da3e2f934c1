"""Measures loading of one tensor parallel rank's shard from a large checkpoint: memory beyond the shard, and speed.

    python tools/bench_load.py [--directory DIR]

A Llama checkpoint of random numbers (4.2 GB unless told otherwise) is written to the directory and left there for the next run;
to a temporary one that is removed when none is given. A fresh process then loads rank 0's shard into parameters that were never
touched, and prints one JSON line:

    ours, peer, ratio  GB/s of load and of read for files out of the page cache, and the first over the second
    overhead_bytes   peak anonymous memory above the state after imports, less the parameters themselves
    cold, warm       for files out of and in the page cache, GB/s of
                     load     shard bytes, into parameters whose memory was never touched (the kernel hands it out meanwhile)
                     reload   the same into the same parameters again: the copy alone
                     read     all bytes of the files, in order, into one small buffer, as `cat` does
                     Best of the rounds, which alternate between them.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

DTYPES = {"bf16": "bfloat16", "fp32": "float32"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, help="where the checkpoint is, or is to be written")
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=9)
    parser.add_argument("--vocab", type=int, default=128256)
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="type of the weights in the files")
    parser.add_argument("--param-dtype", choices=DTYPES, default=None, help="type of the parameters; the files' when unset")
    parser.add_argument("--tp", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)  # the fresh process
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options)))
        return
    with contextlib.ExitStack() as stack:
        if options.directory is None:
            options.directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench_load_"))) / "model"
        config = model_config(options)
        if not _holds(options.directory, config):
            write_checkpoint(options.directory, config, options.dtype)
        again = [sys.executable, __file__, *sys.argv[1:], "--directory", str(options.directory), "--measure"]
        subprocess.run(again, check=True)


def model_config(options: argparse.Namespace) -> dict:
    """A Llama 3 of the given width and depth."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": options.hidden,
        "intermediate_size": 4 * options.hidden,
        "num_hidden_layers": options.layers,
        "num_attention_heads": options.hidden // 64,
        "num_key_value_heads": max(1, options.hidden // 256),
        "vocab_size": options.vocab,
        "tie_word_embeddings": False,
        "dtype": DTYPES[options.dtype],
    }


def _holds(directory: Path, config: dict) -> bool:
    """Whether an earlier run left this very checkpoint there; config.json is written last."""
    file = directory / "config.json"
    return file.exists() and json.loads(file.read_text()) == config


def write_checkpoint(directory: Path, config: dict, dtype: str) -> None:
    """Streams random weights into files of at most 1 GiB."""
    import torch

    from tulu_mega.bridge.families import family_for
    from tulu_mega.bridge.files.hf_writer import ShardWriter, plan_files, tensor_info, write_index

    if directory.exists() and any(directory.iterdir()):
        known = all(each.name == "config.json" or each.name.startswith("model") for each in directory.iterdir())
        if not known:
            sys.exit(f"{directory}: holds other files; give an empty directory")
        shutil.rmtree(directory)
    directory.mkdir(parents=True, exist_ok=True)
    kind = getattr(torch, DTYPES[dtype])
    shapes = family_for(config).hf_shapes(config)
    plan = plan_files([{name: tensor_info(shape, kind) for name, shape in shapes.items()}], max_bytes=2**30)
    torch.manual_seed(0)
    with ShardWriter(directory, plan[0]) as writer:
        for name, shape in shapes.items():
            writer.add(name, torch.empty(shape, dtype=kind).uniform_(-1, 1))
    write_index(directory, plan)
    (directory / "config.json").write_text(json.dumps(config))


def measure(options: argparse.Namespace) -> dict:
    """In a process that has loaded nothing yet."""
    import safetensors  # noqa: F401
    import torch

    from tulu_mega.bridge.families import family_for
    from tulu_mega.bridge.files.hf_files import HfCheckpoint
    from tulu_mega.bridge.live import load_hf
    from tulu_mega.bridge.shards import ModelShard
    from tulu_mega.distributed.grid import ShardGrid

    torch.set_num_threads(1)
    dtype = getattr(torch, DTYPES[options.param_dtype or options.dtype])
    checkpoint = HfCheckpoint.open(options.directory)
    files = sorted({options.directory / info.file for info in checkpoint.tensors.values()})
    size = sum(file.stat().st_size for file in files)
    family, grid = family_for(checkpoint.config), ShardGrid(tensor=options.tp)
    rates = {state: {"load": 0.0, "reload": 0.0, "read": 0.0} for state in ("cold", "warm")}
    overhead = shard = 0
    for _ in range(options.rounds):
        for state, prepare in (("cold", _evict), ("warm", _read)):
            prepare(files)
            _best(rates[state], "read", size, lambda: _read(files))
            prepare(files)
            before = anonymous_bytes()
            with PeakAnonymous() as peak:
                model = shard_module(family, checkpoint.config, grid, dtype)
                loaded = HfCheckpoint.open(options.directory)
                elements = sum(parameter.numel() for parameter in model.parameters())
                shard = elements * getattr(torch, DTYPES[options.dtype]).itemsize
                load = functools.partial(load_hf, ModelShard([model], checkpoint.config, family, grid), loaded)
                _best(rates[state], "load", shard, load)
            overhead = max(overhead, peak.bytes - before - elements * dtype.itemsize)
            loaded.close()
            prepare(files)
            _best(rates[state], "reload", shard, load)
            del model, loaded, load
    rounded = {state: {name: round(rate, 3) for name, rate in rate_by_name.items()} for state, rate_by_name in rates.items()}
    ours, peer = rates["cold"]["load"], rates["cold"]["read"]
    result = {"bench": "load", "ours": round(ours, 3), "peer": round(peer, 3), "ratio": round(ours / peer, 3)}
    return {**result, "checkpoint_bytes": size, "shard_bytes": shard, "overhead_bytes": overhead, "tp": options.tp, **rounded}


def shard_module(family, config: dict, grid, dtype):
    """A module with the parameters, and nothing else, of Megatron's model on one tensor parallel rank; never touched memory."""
    import torch
    from torch import nn

    root = nn.Module()
    for rule in family.rules:
        layers = config["num_hidden_layers"] if "{i}" in rule.megatron[0] else 1
        for name in (rule.megatron[0].format(i=i) for i in range(layers)):
            *parents, last = name.split(".")
            module = root
            for parent in parents:
                if not hasattr(module, parent):
                    module.add_module(parent, nn.ModuleList() if parent == "layers" else nn.Module())
                module = getattr(module, parent)
            module.register_parameter(last, nn.Parameter(torch.empty(family.local_shape(name, config, grid), dtype=dtype)))
    for i, layer in enumerate(root.decoder.layers):
        layer.layer_number = i + 1
    return root


def anonymous_bytes() -> int:
    """RssAnon of this process: memory that no file backs."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))


class PeakAnonymous:
    """Samples `anonymous_bytes` from a thread while the block runs; `bytes` is the highest seen."""

    def __enter__(self) -> PeakAnonymous:
        self.bytes = anonymous_bytes()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_exception) -> None:
        self._done.set()
        self._thread.join()
        self.bytes = max(self.bytes, anonymous_bytes())

    def _watch(self) -> None:
        while not self._done.wait(0.002):
            self.bytes = max(self.bytes, anonymous_bytes())


def _evict(files: list[Path]) -> None:
    """Asks the kernel to drop the files from its page cache."""
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def _read(files: list[Path]) -> None:
    buffer = bytearray(2**20)
    for file in files:
        with file.open("rb", buffering=0) as opened:
            while opened.readinto(buffer):
                pass


def _best(rates: dict[str, float], name: str, nbytes: int, action: Callable[[], object]) -> None:
    start = time.perf_counter()
    action()
    rates[name] = max(rates[name], nbytes / (time.perf_counter() - start) / 1e9)


if __name__ == "__main__":
    main()
