"""Conversions that are killed, share their work, or are large."""


from __future__ import annotations

import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.lib.conversions import command, convert, make_source
from tulu_mega.convert import manifest


def killed_at_random(source: Path, output: Path, to: str, kills: int, seed: int, final_check) -> None:
    """Ends the command by SIGKILL after random times, then lets it end."""
    moments = random.Random(seed)
    begin = time.monotonic()
    subprocess.run(command(source, output, to), check=True, timeout=120, stdout=subprocess.DEVNULL)
    full = time.monotonic() - begin
    shutil.rmtree(output)
    interrupted = 0
    while interrupted < kills:
        process = subprocess.Popen(command(source, output, to), stdout=subprocess.DEVNULL, start_new_session=True)
        try:
            process.wait(timeout=full * moments.uniform(0.5, 1.0))
            shutil.rmtree(output)  # it was faster
        except subprocess.TimeoutExpired:
            os.kill(process.pid, signal.SIGKILL)  # its workers are to end with it
            process.wait()
            interrupted += 1
    time.sleep(0.5)
    left = subprocess.run(["pgrep", "-f", str(output)], capture_output=True, text=True).stdout.split()
    assert not left
    subprocess.run(command(source, output, to, "--verify", "true"), check=True, timeout=120, stdout=subprocess.DEVNULL)
    final_check(output)


def everything(megatron: Path):
    def check(output: Path) -> None:
        assert manifest.hashes(output) == manifest.hashes(megatron)

    return check


@pytest.mark.acceptance
def test_the_command_killed_at_random_moments(tmp_path):
    source = make_source(tmp_path / "hf", "fp32", layers=40)
    megatron = convert(source, tmp_path / "whole", "megatron")
    killed_at_random(source, tmp_path / "out", "megatron", kills=10, seed=1, final_check=everything(megatron))


@pytest.mark.parametrize("to", ["megatron", "hf"])
def test_killed_at_random_moments(tmp_path, to):
    """As the command, but forked from here, where everything is imported: nearly all of the time is conversion."""
    first = make_source(tmp_path / "hf", "fp32", layers=30)
    source = first if to == "megatron" else convert(first, tmp_path / "megatron", "megatron")
    fork, moments = multiprocessing.get_context("fork"), random.Random(4)

    def attempt(output: Path, seconds: float = 0.0) -> int | None:
        """Its exit status; the kernel ends it after so many seconds of processor time, which are the same on a busy machine."""

        def limited() -> None:
            signal.setitimer(signal.ITIMER_PROF, seconds)
            convert(source, output, to)

        process = fork.Process(target=limited)
        process.start()
        process.join()
        return process.exitcode

    before = os.times()
    assert attempt(tmp_path / "whole") == 0
    after = os.times()
    full = after.children_user + after.children_system - before.children_user - before.children_system
    killed = sum(attempt(tmp_path / "out", full * moments.uniform(0.1, 0.5)) == -signal.SIGPROF for _ in range(10))
    out = convert(source, tmp_path / "out", to, verify=True)
    assert killed >= 3
    assert manifest.hashes(out) == manifest.hashes(tmp_path / "whole")


def test_ranks_of_torchrun_share_the_work(tmp_path):
    source = make_source(tmp_path / "hf", "bf16")
    single = convert(source, tmp_path / "single", "megatron")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "tulu_mega"]
    arguments = command(source, tmp_path / "out", "megatron")[3:]
    subprocess.run([*launch, *arguments], check=True, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert manifest.hashes(tmp_path / "out") == manifest.hashes(single)


MEASURE = """
import sys, threading
import torch, tulu_mega.convert.run as convert
from tulu_mega.convert.settings import ConvertSettings

def anonymous():
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("RssAnon"))

torch.set_num_threads(1)
before, peak, done = anonymous(), [0], threading.Event()
def watch():
    while not done.wait(0.002):
        peak[0] = max(peak[0], anonymous())
thread = threading.Thread(target=watch, daemon=True)
thread.start()
source, output, to = sys.argv[1:]
convert.run(ConvertSettings(source=source, output=output, to=to, workers=1))
done.set(); thread.join()
print("peak", peak[0] - before)
"""


def peak_bytes(source: Path, output: Path, to: str) -> int:
    ended = subprocess.run([sys.executable, "-c", MEASURE, source, output, to], capture_output=True, text=True, timeout=200)
    assert ended.returncode == 0, ended.stderr[-2000:]
    return int(ended.stdout.split("peak")[1])


def test_memory_does_not_grow_with_the_model(tmp_path):
    """Twice the largest tensor and 512 MB is the promise; here a fraction of a model whose tensors are small does."""
    source = make_source(tmp_path / "hf", "fp32", hidden=1024, layers=9, vocab=2000, file_bytes=2**31)
    largest, whole = 4 * 1024 * 2 * 2048, sum(file.stat().st_size for file in source.glob("*.safetensors"))
    assert whole > 8 * 2 * largest
    for to, start, output in (("megatron", source, tmp_path / "megatron"), ("hf", tmp_path / "megatron", tmp_path / "again")):
        assert peak_bytes(start, output, to) < 2 * largest + 64 * 2**20
