"""How fast a trainer's weights come into a vLLM server, against the speed of memory and vLLM's own loading.

    python tools/bench_sync.py
    python tools/bench_sync.py --hidden 1024 --layers 4 --dtype bf16

One trainer rank with a Llama of about 1 GB and one vLLM server, whose worker takes the weights, all on this machine. Rounds of
five measurements take turns, the best of each counts; prints one JSON line:

    ours, peer, ratio   GB/s from the trainer's parameters to the worker's hands: gathered, sent, received, and hashed at both
                        ends (a rehearsal: vLLM loads nothing); of a copy in memory, by torch on one thread; the first over the
                        second
    one_memcpy          GB/s of the same bytes in one `memcpy` (numpy's copy), which where the C library sees fit passes the
                        caches by
    update_seconds      a whole update, from pausing the server until it serves again
    loading_seconds     vLLM's `model.load_weights` of as many bytes that lie in the worker's memory, through its layerwise reload
    update_ratio        the first over the second
    worker_seconds      of the best update, what the worker spent on receiving, hashing and loading
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import sys
import tempfile
import time
from pathlib import Path

DTYPES = {"fp32": "float32", "bf16": "bfloat16"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=1536)
    parser.add_argument("--layers", type=int, default=7)
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--transport", choices=["shm", "gloo"], default="shm")
    parser.add_argument("--bucket-mib", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench_sync_") as directory:
        print(json.dumps(measure(options, Path(directory))))


def measure(options: argparse.Namespace, root: Path) -> dict:
    from tulu_mega.inference.command_line import ServerOptions, core_shares
    from tulu_mega.inference.pool import ServerPool
    from tulu_mega.vllm_plugin.gate import server_arguments

    model = root / "model"
    model.mkdir()
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": options.hidden,
        "intermediate_size": 4 * options.hidden,
        "num_hidden_layers": options.layers,
        "num_attention_heads": options.hidden // 64,
        "num_key_value_heads": max(1, options.hidden // 256),
        "vocab_size": options.vocab,
        "max_position_embeddings": 256,
        "tie_word_embeddings": False,
        "dtype": DTYPES[options.dtype],
    }
    (model / "config.json").write_text(json.dumps(config))
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent / "race/peers"), *sys.path])
    extra = (*server_arguments(), "--worker-extension-cls", "vllm_loading.OwnLoading")
    served = ServerOptions(
        str(model), dtype=DTYPES[options.dtype], max_model_len=256, concurrency=8, random_weights=True, extra=extra
    )
    cores = core_shares(sorted(os.sched_getaffinity(0)), 1, 1)
    with ServerPool(served, root / "run", cores=cores, restarts=0) as pool:
        return race(options, str(model), pool.wait())


def race(options: argparse.Namespace, model: str, servers: list) -> dict:
    """Beside a server that runs."""
    import numpy as np
    import torch

    from tulu_mega.config import EngineSettings, RolloutSettings
    from tulu_mega.launch.launcher import World
    from tulu_mega.train.session import opened
    from tulu_mega.weight_transfer.attach import attach
    from tulu_mega.weight_transfer.control import ServerControl
    from tulu_mega.weight_transfer.push import push

    torch.set_num_threads(1)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    settings = EngineSettings.model_validate({"model": {"path": model, "dtype": options.dtype}})
    rollout = RolloutSettings(transport=options.transport, bucket_mib=options.bucket_mib)
    (server,) = servers
    control = ServerControl(server.url, server.key, 300)
    best = {"hands": 0.0, "copy": 0.0, "memcpy": 0.0, "update": float("inf"), "loading": float("inf")}
    worker: dict[str, float] = {}
    with opened(settings, World(0, 1, 0, 1, 1), seed=0) as session:
        with torch.no_grad():
            for chunk in session.engine.chunks:
                for parameter in chunk.parameters():
                    parameter.uniform_(-0.1, 0.1)
        connection = attach(session.sender(rollout), servers, rollout)
        nbytes = _good(push(connection, 0)).bytes  # the first meets untouched memory and learns vLLM's names
        source, target = torch.rand(nbytes // 4), torch.empty(nbytes // 4)
        for version in range(options.rounds):
            best["hands"] = max(best["hands"], nbytes / _good(push(connection, 0, load=False)).streaming / 1e9)
            best["copy"] = max(best["copy"], nbytes / _timed(lambda: target.copy_(source)) / 1e9)
            best["memcpy"] = max(best["memcpy"], nbytes / _timed(lambda: np.copyto(target.numpy(), source.numpy())) / 1e9)
            seconds = _good(push(connection, version + 1)).seconds
            if seconds < best["update"]:
                best["update"], worker = seconds, control.weights_status()[0]["seconds"]
            loading = control.call_workers("own_loading")[0]["seconds"]
            best["loading"] = min(best["loading"], loading)
        connection.close()
    control.close()
    return {
        "bench": "sync",
        "ours": round(best["hands"], 3),
        "peer": round(best["copy"], 3),
        "ratio": round(best["hands"] / best["copy"], 3),
        "one_memcpy": round(best["memcpy"], 3),
        "update_seconds": round(best["update"], 3),
        "loading_seconds": round(best["loading"], 3),
        "update_ratio": round(best["update"] / best["loading"], 3),
        "worker_seconds": {name: round(value, 3) for name, value in worker.items()},
        "bytes": nbytes,
        "dtype": options.dtype,
        "transport": options.transport,
    }


def _good(report):
    if report.failed:
        sys.exit(f"the server did not take the weights: {report.failed}")
    return report


def _timed(action) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
