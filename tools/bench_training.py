"""How fast layers of Llama 3.1 8B's shape train on one device: tokens/s, model FLOP/s, and both beside what the device can do.

    python3 tools/bench_training.py                                on a CUDA device (says so, and no more, where there is none)
    python3 tools/bench_training.py --pack 8192 --set megatron.gradient_accumulation_fusion=false
    python3 tools/bench_training.py --pack 8192 --profile          and which kernels the time goes to
    python3 tools/bench_training.py --device cpu                   a small model, to see that it works

As many layers are taken as `tulu_mega.plan.model` says fit with gradients and optimizer; two fewer each time that it was wrong.
Packs hold conversations of lengths like Tulu 3's, a step's packs 64k tokens, and steps are SFT's by this project's engine.
Nothing has to be installed but megatron-core and what setup.py lists; the repository is put on the path. Prints figures as soon
as they are there, and at the end one JSON line; after a failure or a time-out (an interrupt, or a signal to end) with what was
measured until then:

    layers, parameters       what was trained
    attention, settings      what it was trained with
    products                 the step's matrix products alone, by torch, in the model's precision: TFLOP/s of a layer's, of the
                             head's and of both as a step has them (`tflops`, the ceiling)
    packs                    by tokens of a pack: seconds of a step (median) and of its parts; tokens/s;
                             `tflops` of the model (`planner.flops`), `mfu` of the data sheet's peak (on a CPU null),
                             `of_products` of the ceiling; memory at the peak; `planner`: what it says of both, over what was seen
    kernels                  with --profile: milliseconds on the device in one step, by kernel, the largest first
    failed                   what raised an error; the other figures are there

Exit status 1 when something failed, 2 when settings do not go together, a step is not finite or no layers fit.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import signal
import socket
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "kernels"))

from training_products import products

from tulu_mega.config import SftSettings, load
from tulu_mega.config.sft import MEAN_LENGTH
from tulu_mega.data.batch import pack
from tulu_mega.errors import UserError
from tulu_mega.launch.launcher import World
from tulu_mega.layout.alignment import Alignment
from tulu_mega.layout.flops import training_flops
from tulu_mega.layout.hardware import GPUS, Gpu
from tulu_mega.layout.schedule import Pipeline
from tulu_mega.model.build import attention_of
from tulu_mega.model.config import DTYPES
from tulu_mega.objectives.sft import SftObjective
from tulu_mega.plan.model.calibration import RATES
from tulu_mega.plan.model.job import Job, Pack
from tulu_mega.plan.model.memory import rank_memory
from tulu_mega.plan.model.timing import train_step
from tulu_mega.plan.model.workload import LABELLED, draw_lengths, pack_step
from tulu_mega.records import IGNORE, PackedBatch, TokenizedRow
from tulu_mega.train.engine import Engine
from tulu_mega.train.metrics import peak_flops
from tulu_mega.train.session import opened

SHAPE = Path(__file__).resolve().parents[1] / "examples/architectures/llama3.1_8b/config.json"
SMALL = {"hidden_size": 256, "intermediate_size": 896, "num_attention_heads": 8, "num_key_value_heads": 2, "vocab_size": 2048}
"""In its place on a CPU, with heads of `head_dim` 32."""
ROOM = 0.96
"""Share of the device's memory that the planner may fill."""
LOCAL = 1.2
"""Activations of layers that are not Transformer Engine's over the planner's, which are: rotated queries and keys are kept beside
the fused ones, and keys and values of all query heads where torch's attention knows no groups."""
TOKENS = {"cuda": 65_536, "cpu": 2_048}
"""Of a step."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"])
    parser.add_argument("--layers", type=int, help="as many as fit; on a CPU 2")
    parser.add_argument("--pack", nargs="+", type=int, help="tokens of a pack: 4096 8192; on a CPU 256 512")
    parser.add_argument("--steps", type=int, default=5, help="timed, after two that are not")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="settings of tulu-mega sft")
    parser.add_argument("--profile", action="store_true", help="look at one step more of the last pack length, by kernel")
    options = parser.parse_args()
    if options.device is None and not torch.cuda.is_available():
        print(json.dumps({"bench": "training", "not_run": "torch sees no CUDA device"}))
        return 0
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device; run this on a GPU machine or with --device cpu")
    on_gpu = options.device != "cpu"
    if not on_gpu and torch.cuda.is_available():
        parser.error("a CUDA device is taken where there is one; for --device cpu hide it: CUDA_VISIBLE_DEVICES=''")
    for name, given, least in (("steps", [options.steps], 1), ("layers", [options.layers], 1), ("pack", options.pack or [], 64)):
        if any(value is not None and value < least for value in given):
            parser.error(f"--{name} {' '.join(map(str, given))}: expected at least {least}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("error: told to end"))
    report: dict[str, Any] = {"bench": "training", "failed": []}
    try:
        bench(on_gpu, options, report)
    except UserError as error:
        print("\n".join(f"error: {problem}" for problem in error.problems), file=sys.stderr)
        return 2
    except torch.cuda.OutOfMemoryError:
        return again_with_fewer(options)
    finally:
        if "layers" in report:
            print(json.dumps(report), flush=True)
    return int(bool(report["failed"]))


def again_with_fewer(options: argparse.Namespace) -> int:
    """Starts this program anew, which frees everything, with two layers fewer than did not fit. Status 2 where none are left."""
    fewer = options.layers - 2
    print(f"error: {options.layers} layers do not fit" + (f"; trying {fewer}" if fewer > 0 else ""), file=sys.stderr, flush=True)
    if fewer > 0:
        os.execv(sys.executable, [sys.executable, *sys.argv, "--layers", str(fewer)])  # the last --layers counts
    return 2


def bench(on_gpu: bool, options: argparse.Namespace, report: dict[str, Any]) -> None:
    """Puts into the report what was measured.

    Raises:
        UserError: settings that do not go together.
        OutOfMemoryError: with `options.layers` set to what did not fit.
    """
    kind = "cuda" if on_gpu else "cpu"
    lengths = options.pack or ([4096, 8192] if on_gpu else [256, 512])
    shape = json.loads(SHAPE.read_text())
    if not on_gpu:
        shape |= SMALL | {"head_dim": SMALL["hidden_size"] // SMALL["num_attention_heads"]}
    gpu = known_gpu()
    with tempfile.TemporaryDirectory(prefix="bench_training_") as scratch:
        directory = Path(scratch)
        settings = load(SftSettings, None, flags(directory, on_gpu, options.set))
        if settings.parallel.model_parallel > 1:
            raise UserError(f"parallel: {settings.parallel.model_parallel} ranks; this trains on one device")
        filled = {length: contents(shape, length, TOKENS[kind] // length or 1) for length in lengths}
        options.layers = options.layers or (most_layers(shape, filled, settings, gpu) if on_gpu else 2)
        shape["num_hidden_layers"] = options.layers
        (directory / "config.json").write_text(json.dumps(shape))
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # a machine's own name need not be an address
        for name, value in {"RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}.items():
            os.environ[name] = str(value)
        with opened(settings, World(0, 1, 0, 1, 1), settings.seed) as session:
            engine = session.engine
            fill(engine)
            engine.prepare_training(settings.optim, len(lengths) * (options.steps + 3))
            report |= {
                **machine(engine.platform.device),
                "layers": options.layers,
                "parameters": sum(p.numel() for chunk in engine.chunks for p in chunk.parameters()),
                "dtype": settings.model.dtype,
                "attention": attention_of(engine.hf, engine.settings, engine.topology, engine.platform),
                "settings": options.set,
                "packs": {},
            }
            show(f"{options.layers} layers", report["attention"])
            ceiling = products(engine, shape, max(lengths))
            report["products"] = {name: round(value / 1e12, 3) for name, value in ceiling.items()}
            show("products", report["products"])
            timer = Timer(engine, options.steps)
            for length in lengths:
                with noting(report, f"packs of {length}"):
                    report["packs"][length] = timed(timer, shape, filled[length], settings, gpu, ceiling["tflops"])
                    show(f"packs of {length}", report["packs"][length])
            if options.profile:
                with noting(report, "profile"):
                    report["kernels"] = profile(timer, batches(shape, filled[lengths[-1]]))


def show(name: str, figures: Any) -> None:
    """A line at once, for whoever watches or has to stop it."""
    print(f"{name}: {json.dumps(figures)}", flush=True)


@contextlib.contextmanager
def noting(report: dict[str, Any], what: str) -> Iterator[None]:
    """An error is told and noted as `failed` and ends no more than this; settings and memory are what the whole depends on."""
    try:
        yield
    except (UserError, torch.cuda.OutOfMemoryError):
        raise
    except Exception:
        traceback.print_exc()
        report["failed"].append(what)


def flags(directory: Path, on_gpu: bool, given: Sequence[str]) -> list[str]:
    """Settings as a command line has them; later ones count."""
    own = {
        "model": directory, "run_dir": directory, "data.train": directory, "optim.lr": 1e-5, "train.steps": 1,
        "model.dtype": "bf16" if on_gpu else "fp32",
    }  # fmt: skip
    wrong = [word for word in given if "=" not in word]
    if wrong:
        raise UserError([f"--set {word}: expected KEY=VALUE, such as model.recompute=full" for word in wrong])
    merged = {name: str(value) for name, value in own.items()} | dict(word.split("=", 1) for word in given)
    return [f"--{name}={value}" for name, value in merged.items()]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def machine(device: torch.device) -> dict[str, Any]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu"
    return {"device": name, "python": platform.python_version(), "torch": torch.__version__}


def known_gpu() -> Gpu | None:
    """The planner's figures for this device, if it has any."""
    if not torch.cuda.is_available():
        return None
    words = torch.cuda.get_device_name().lower().replace("-", " ").split()
    return next((gpu for name, gpu in GPUS.items() if name in words), None)


# What is trained on


def contents(shape: dict[str, Any], length: int, count: int) -> tuple[Pack, ...]:
    """Packs of conversations of lengths like Tulu 3's: about as many as asked for, all but full."""
    taken: list[int] = []
    for each in draw_lengths(count * length // 64, MEAN_LENGTH, length, seed=0):
        if sum(taken) + each <= 0.985 * count * length:  # what is too long for the rest is passed over
            taken.append(each)
    (packs,) = pack_step(
        taken, [max(1, round(LABELLED * each)) for each in taken], 1, length, Alignment(1, 1), Pipeline(1, 1, (1.0,), 2.0),
        shape["hidden_size"], shape["intermediate_size"],
    )  # fmt: skip
    return packs


def batches(shape: dict[str, Any], packs: Sequence[Pack]) -> list[PackedBatch]:
    """Random tokens; the end of each conversation is trained."""
    drawn = torch.Generator().manual_seed(0)
    made = []
    for content in packs:
        rows = []
        for row, length in enumerate(content.lengths):
            ids = torch.randint(shape["vocab_size"], (length,), generator=drawn).tolist()
            trained = max(1, round(LABELLED * length))
            rows.append(TokenizedRow(row, ids, [IGNORE] * (length - trained) + ids[length - trained :]))
        made.append(pack(rows, Alignment(1, 1)))
    return made


def fill(engine: Engine) -> None:
    """Weights as of a model at its beginning: nothing is loaded, and speed depends on how random bits are."""
    torch.manual_seed(0)
    with torch.no_grad():
        for chunk in engine.chunks:
            for parameter in chunk.parameters():
                parameter.fill_(1.0) if parameter.dim() == 1 else parameter.normal_(0.0, 0.02)


# How many layers fit, and what the planner says of them


def job(shape: dict[str, Any], packs: Sequence[Pack], settings: SftSettings, gpu: Gpu) -> Job:
    return Job(
        shape, settings.parallel, gpu, (tuple(packs),), dtype=settings.model.dtype, recompute=settings.model.recompute,
        fp8=settings.precision.fp8 != "off",
    )  # fmt: skip


def most_layers(
    shape: dict[str, Any], filled: dict[int, tuple[Pack, ...]], settings: SftSettings, gpu: Gpu | None
) -> int:
    """Raises UserError on a GPU that the planner does not know."""
    if gpu is None:
        raise UserError(f"{torch.cuda.get_device_name()} is not in the planner's table: say how many layers, --layers N")
    free = ROOM * torch.cuda.mem_get_info()[1]

    def fits(layers: int) -> bool:
        planned = (
            rank_memory(job(shape | {"num_hidden_layers": layers}, packs, settings, gpu), 0) for packs in filled.values()
        )
        return all(memory.total + (LOCAL - 1) * memory.activations <= free for memory in planned)

    return max((layers for layers in range(1, shape["num_hidden_layers"] + 1) if fits(layers)), default=1)


# What is measured


@dataclass
class Timer:
    """Steps of the engine, and where their time went."""

    engine: Engine
    steps: int
    done: int = 0

    def step(self, micro_batches: Sequence[PackedBatch]) -> tuple[float, float]:
        """Seconds of passes and of the update."""
        self.wait()
        began = time.perf_counter()
        loss = self.engine.forward_backward(micro_batches, SftObjective("token_mean"))
        self.wait()
        passed = time.perf_counter()
        update = self.engine.optimizer_step(self.done, loss.loss)
        self.wait()
        self.done += 1
        if not update.applied:
            raise UserError(f"step {self.done}: loss {loss.loss}, gradient norm {update.grad_norm}: not finite")
        return passed - began, time.perf_counter() - passed

    def wait(self) -> None:
        if self.engine.platform.device.type == "cuda":
            torch.cuda.synchronize()


def timed(
    timer: Timer, shape: dict[str, Any], packs: Sequence[Pack], settings: SftSettings, gpu: Gpu | None, ceiling: float
) -> dict[str, Any]:
    micro_batches, device = batches(shape, packs), timer.engine.platform.device
    timer.step(micro_batches), timer.step(micro_batches)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    spent = [timer.step(micro_batches) for _ in range(timer.steps)]
    seconds = statistics.median(map(sum, spent))
    lengths = [length for each in packs for length in each.lengths]
    flops = training_flops(shape, lengths)
    peak = peak_flops(device, DTYPES[settings.model.dtype])
    found: dict[str, Any] = {
        "micro_batches": len(packs),
        "tokens": sum(lengths),
        "sequences": len(lengths),
        "seconds": round(seconds, 4),
        "seconds_passes": round(statistics.median(passes for passes, _ in spent), 4),
        "seconds_update": round(statistics.median(update for _, update in spent), 4),
        "all_seconds": [round(sum(each), 4) for each in spent],
        "tokens_per_second": round(sum(lengths) / seconds, 1),
        "tflops": round(flops / seconds / 1e12, 3),
        "mfu": peak and round(flops / seconds / peak, 4),
        "of_products": round(flops / seconds / ceiling, 4),
    }
    if device.type == "cuda":
        found["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
        found["reserved_gib"] = round(torch.cuda.max_memory_reserved() / 2**30, 2)
    if gpu:
        planned = job(shape, packs, settings, gpu)
        memory = rank_memory(planned, 0)
        found["planner"] = {
            "seconds": round(train_step(planned, RATES).seconds / seconds, 3),
            "memory": round((memory.total - memory.reserved) / torch.cuda.max_memory_allocated(), 3),
        }
    return found


def profile(timer: Timer, micro_batches: Sequence[PackedBatch]) -> dict[str, float]:
    """Milliseconds of one step by kernel (on a CPU by operator, without those it calls), the 40 largest."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    on_gpu = torch.cuda.is_available()
    with profiler(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as seen:
        timer.step(micro_batches)
    times = {each.key: (each.self_device_time_total if on_gpu else each.self_cpu_time_total) for each in seen.key_averages()}
    largest = sorted(times.items(), key=lambda item: -item[1])[:40]
    return {name[:160]: round(microseconds / 1e3, 3) for name, microseconds in largest if microseconds}


if __name__ == "__main__":
    sys.exit(main())
