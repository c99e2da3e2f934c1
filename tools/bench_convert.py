"""Measures conversion against `cp` of the same bytes on the same disk, and the memory it takes.

    python tools/bench_convert.py --directory /scratch

A Llama of random numbers (10 GB of bf16 unless told otherwise) is written to a temporary directory there, copied, converted to
Megatron's distributed checkpoint, and converted back. Everything is measured until it is on the disk (fsync, `sync`), from files
that are not in the page cache. Three times the model's size must be free. Prints one JSON line:

    model_bytes, largest_tensor_bytes
    cp             GB/s of `cp -r` and `sync` of the source, before and after each conversion
    to_megatron, to_hf
                   GB/s, ratio to the mean of the cp around it, and the most anonymous memory of one process, less what it had
                   after imports
    allowed_bytes  twice the largest tensor and 512 MB
    equal          whether the way there and back gave the same hashes
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[1]
IMPORTS = "import tulu_mega.convert.run; print(next(int(x.split()[1]) for x in open('/proc/self/status') if 'RssAnon' in x))"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, default=Path(tempfile.gettempdir()), help="on the disk to be measured")
    parser.add_argument("--gigabytes", type=float, default=10.0)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench_convert_", dir=options.directory) as scratch:
        print(json.dumps(measure(Path(scratch), options.gigabytes, options.workers)))


def measure(scratch: Path, gigabytes: float, workers: int) -> dict:
    """Makes the model and goes there and back."""
    largest = write_model(scratch / "hf", gigabytes * 1e9)
    size = sum(file.stat().st_size for file in (scratch / "hf").glob("*.safetensors"))
    if shutil.disk_usage(scratch).free < 2.5 * size:
        sys.exit(f"{scratch}: 2.5 x {size / 1e9:.1f} GB must be free beside the model")
    report: dict = {"model_bytes": size, "largest_tensor_bytes": largest, "workers": workers, "cp": []}
    for to, source, output in (("megatron", "hf", "megatron"), ("hf", "megatron", "again")):
        copies = [copy_rate(scratch / source, scratch / "copy", size)]
        evict(scratch / source)
        arguments = ["--source", str(scratch / source), "--output", str(scratch / output), "--to", to, "--workers", str(workers)]
        seconds, peak = watched([sys.executable, "-m", "tulu_mega", "convert", *arguments])
        evict(scratch / output)
        copies.append(copy_rate(scratch / source, scratch / "copy", size))
        report["cp"] += [round(rate, 3) for rate in copies]
        rate, cp = size / seconds / 1e9, sum(copies) / 2
        report[f"to_{to}"] = {"rate": round(rate, 3), "ratio": round(rate / cp, 3), "peak_anonymous_bytes": peak}
        if to == "megatron":
            before = hashes(scratch / "hf")
            shutil.rmtree(scratch / "hf")
    report["allowed_bytes"] = 2 * largest + 512 * 10**6
    report["equal"] = before == hashes(scratch / "again")
    return report


def write_model(directory: Path, nbytes: float) -> int:
    """A Llama of that size in files of at most 2 GiB; returns the bytes of its largest tensor."""
    import torch

    sys.path.insert(0, str(ROOT))
    from tools.bench_load import model_config
    from tulu_mega.bridge.families import family_for
    from tulu_mega.bridge.files.hf_writer import ShardWriter, plan_files, tensor_info, write_index

    shape = argparse.Namespace(hidden=4096, layers=1, vocab=128256, dtype="bf16")
    fixed = 2 * 2 * 128256 * 4096
    one = sum(torch.Size(s).numel() * 2 for s in family_for(model_config(shape)).hf_shapes(model_config(shape)).values()) - fixed
    shape.layers = max(1, round((nbytes - fixed) / one) + 1)
    config = model_config(shape)
    shapes = family_for(config).hf_shapes(config)
    plan = plan_files([{name: tensor_info(s, torch.bfloat16) for name, s in shapes.items()}], max_bytes=2**31)
    directory.mkdir()
    noise = torch.empty(2**28, dtype=torch.bfloat16).uniform_(-1, 1)
    with ShardWriter(directory, plan[0]) as writer:
        for at, (name, s) in enumerate(shapes.items()):
            writer.add(name, _cut(noise, at, s))
    write_index(directory, plan)
    (directory / "config.json").write_text(json.dumps(config))
    return max(torch.Size(s).numel() * 2 for s in shapes.values())


def _cut(noise, at: int, shape):
    """Different values for each tensor without drawing them anew."""
    count = math.prod(shape)
    if count > noise.numel():
        noise = noise.repeat(-(-count // noise.numel()))
    start = (at * 1_000_003) % (noise.numel() - count + 1)
    return noise[start : start + count].view(shape)


def copy_rate(source: Path, target: Path, nbytes: int) -> float:
    """GB/s of cp and sync."""
    evict(source)
    os.sync()
    begin = time.perf_counter()
    subprocess.run(["cp", "-r", str(source), str(target)], check=True)
    subprocess.run(["sync", *map(str, target.iterdir())], check=True)
    rate = nbytes / (time.perf_counter() - begin) / 1e9
    shutil.rmtree(target)
    return rate


def evict(directory: Path) -> None:
    """Asks the kernel to drop a directory's files from its page cache."""
    for file in directory.iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def watched(command: list[str]) -> tuple[float, int]:
    """Seconds that a command takes, and the most anonymous memory that a process of it had above the state after imports."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    imports = subprocess.run([sys.executable, "-c", IMPORTS], check=True, capture_output=True, text=True, env=environment)
    base = int(imports.stdout.split()[-1]) * 1024
    begin = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=environment)
    peak = [0]
    watcher = threading.Thread(target=_watch, args=(process, lambda seen: peak.__setitem__(0, max(peak[0], seen))))
    watcher.start()
    status = process.wait()
    seconds = time.perf_counter() - begin
    watcher.join()
    if status:
        raise subprocess.CalledProcessError(status, command)
    return seconds, max(0, peak[0] - base)


def _watch(process: subprocess.Popen, note: Callable[[int], None]) -> None:
    while process.poll() is None:
        try:
            root = psutil.Process(process.pid)
            for each in (root, *root.children(recursive=True)):
                with open(f"/proc/{each.pid}/status") as status:
                    note(next((int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon")), 0))
        except (psutil.Error, OSError):
            pass
        time.sleep(0.02)


def hashes(directory: Path) -> dict[str, str]:
    """Of every tensor, computed from the files."""
    from tulu_mega.bridge.box import Box
    from tulu_mega.bridge.files.hf_files import HfCheckpoint
    from tulu_mega.convert.manifest import hash_of

    files = HfCheckpoint.open(directory)
    return {name: hash_of(files.read_box(name, Box.whole(info.shape))) for name, info in files.tensors.items()}


if __name__ == "__main__":
    main()
