"""An outlook in words and numbers: tables for people, JSON for programs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from tulu_mega.config.recompute import Recomputed
from tulu_mega.layout.flops import matmul_parameters
from tulu_mega.plan.model.calibration import RATES
from tulu_mega.plan.model.job import Job
from tulu_mega.plan.model.parameters import model_parameters
from tulu_mega.plan.outlook import Outlook

_GIB = 2**30
_PARTS = {
    "products": "matrix products",
    "attention": "attention",
    "elementwise": "between products",
    "tensor": "tensor parallel, exposed",
    "context": "context parallel, exposed",
    "pipeline": "pipeline transfers, exposed",
    "host": "waiting for the host",
    "idle": "waiting",
    "data": "gradients and parameters, exposed",
    "optimizer": "optimizer",
}


def layout(job: Job) -> str:
    """A layout in short."""
    parallel = job.parallel
    sizes = dict(TP=parallel.tensor, PP=parallel.pipeline, VPP=parallel.virtual_pipeline, CP=parallel.context, DP=job.data)
    return " ".join(f"{name}{size}" for name, size in sizes.items() if size > 1 or name in ("TP", "DP"))


def _sizes(job: Job) -> dict[str, int]:
    """A layout in full."""
    parallel = job.parallel
    names = ("tensor", "pipeline", "virtual_pipeline", "context")
    return {**{name: getattr(parallel, name) for name in names}, "data": job.data}


def recomputed(what: Recomputed) -> str:
    """What is computed again, in short."""
    if what.layers == 0:
        return "+".join(sorted(what.modules)) or "none"
    return "full" if what.layers is None else f"{what.layers} a chunk"


def as_json(result: Outlook) -> dict[str, Any]:
    """Everything that is known, in bytes and seconds; null for what would never end, as generation by servers that do not fit."""
    job, servers, hours = result.job, result.servers, result.hours
    return _finite(
        {
            "stage": result.question.stage,
            "parameters": model_parameters(result.question.config),
            "value": _value_json(result),
            "gpu": job.gpu.name,
            "gpus": result.gpus,
            "trainers": job.world,
            "layout": {**_sizes(job), "recompute": recomputed(job.recompute), "layers": list(job.layers)},
            "micro_batches": len(job.packs[0]),
            "padding": result.padding,
            "fits": result.fits,
            "memory": {
                "of_gpu": job.gpu.memory,
                "ranks": [{"rank": rank.rank, **rank.parts, "total": rank.total} for rank in result.memory],
                "host_of_optimizer": result.offloaded,
                "host_of_save": result.host,
                "host_of_resume": result.resume,
                "server": None if servers is None else vars(servers),
            },
            "seconds": {
                **result.step.parts,
                "value": result.value.seconds if result.value else 0.0,
                "rewards": result.rewards.scoring if result.rewards else 0.0,
                "scoring": result.scoring,
                "generation": result.generation,
                "beside_training": -result.beside,
                "sync": result.sync,
                "step": result.seconds,
                "before": result.once,
            },
            "checkpoint": vars(result.storage),
            "tokens_per_second_per_gpu": result.step.tokens / result.seconds / result.gpus,
            "tflops_per_gpu": result.flops_per_gpu / 1e12,
            "steps": result.question.steps,
            "hours": hours,
            "gpu_hours": None if hours is None else hours * result.gpus,
            "rates": vars(RATES),
            "problems": result.problems,
            "warnings": result.warnings,
        }
    )


def _value_json(result: Outlook) -> dict[str, Any] | None:
    """What is known of the value model alone; null without one."""
    value = result.value
    return value and {
        "parameters": model_parameters(value.job.config),
        "layout": {**_sizes(value.job), "layers": list(value.job.layers)},
        "micro_batches": len(value.job.packs[0]),
        "memory": [{"rank": rank.rank, **rank.parts, "total": rank.total} for rank in value.memory],
        "seconds": {**value.step.parts, "scoring": value.scoring, "step": value.seconds},
    }


def _duration(hours: float, of: str = "") -> str:
    """Two or three digits of a time, in the unit that has them.

    Args:
        of: stands before the unit.
    """
    for size, unit in ((1.0, "hours" if of else "h"), (1 / 60, "minutes" if of else "min")):
        if hours >= size:
            number = hours / size
            return f"{number:,.0f} {of}{unit}" if number >= 100 else f"{number:.1f} {of}{unit}"
    return f"{hours * 3600:.2g} {of}{'seconds' if of else 's'}"


def _size(nbytes: float) -> str:
    """Three digits of bytes, in GiB or MiB."""
    number, unit = (nbytes / _GIB, "GiB") if nbytes >= _GIB else (nbytes / 2**20, "MiB")
    return f"{number:,.0f} {unit}" if number >= 100 else f"{number:.1f} {unit}" if number >= 10 else f"{number:.2f} {unit}"


def _finite(value: Any) -> Any:
    """The same with null for numbers that JSON has not."""
    if isinstance(value, dict):
        return {name: _finite(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def as_tables(result: Outlook) -> list[Text | Table]:
    """One outlook."""
    return [_heading(result), _memory(result), _time(result), *_remarks(result)]


def as_ranking(results: Sequence[Outlook], top: int) -> Table:
    """Layouts, the best first."""
    first = results[0]
    count = len(results)
    table = Table(
        title=f"{first.question.stage} on {first.gpus} {first.job.gpu.name}: {count} layouts fit; "
        f"the fastest {min(top, count)}, rates of a GPU",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=0,  # whole in 80 columns
        pad_edge=False,
    )
    for name in ("layout", "recompute", "packs", "GiB", "step s", "idle", "TFLOP/s", "tokens/s", "time"):
        table.add_column(name, justify="left" if name in ("layout", "recompute") else "right", no_wrap=name == "layout")
    for each in results[:top]:
        table.add_row(
            layout(each.job),
            recomputed(each.job.recompute),
            f"{len(each.job.packs[0])}",
            f"{each.fullest.total / _GIB:.1f}",
            f"{each.seconds:.2f}",
            f"{each.step.idle / each.step.seconds:.0%}",
            f"{each.flops_per_gpu / 1e12:.0f}",
            f"{each.step.tokens / each.seconds / each.gpus:,.0f}",
            "–" if each.hours is None else _duration(each.hours),
        )
    return table


def _heading(result: Outlook) -> Text:
    job, question = result.job, result.question
    billions = model_parameters(question.config) / 1e9
    kind = "FP8" if job.fp8 else job.dtype
    aside = f" + {question.servers.gpus} that generate" if question.servers else ""
    text = (
        f"{question.stage}: {question.settings.model.path}, {billions:.2f} billion parameters ({kind}) on {job.world}{aside} "
        f"{job.gpu.name}, {layout(job)}, recompute {recomputed(job.recompute)}, {len(job.packs[0])} micro-batches a replica, "
        f"{result.padding:.1%} padding"
    )
    if value := result.value:
        billions = model_parameters(value.job.config) / 1e9
        text += f"; value model: {question.value.settings.model.path}, {billions:.2f} billion parameters, {layout(value.job)}"
    if rewards := result.rewards:
        billions = model_parameters(rewards.job.config) / 1e9
        text += f"; reward model: {question.rewards.settings.model.path}, {billions:.2f} billion parameters"
    return Text(text)


def _memory(result: Outlook) -> Table:
    """First, fullest and last rank: those between are between."""
    shown = {result.memory[0].rank: "first", result.memory[-1].rank: "last", result.fullest.rank: "fullest"}
    table = Table(title="memory of a GPU, GiB, by pipeline rank", title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("")
    ranks = [result.memory[rank] for rank in sorted(shown)]
    for rank in ranks:
        table.add_column(f"{rank.rank} ({shown[rank.rank]})", justify="right")
    for name in ranks[0].parts:
        sizes = [rank.parts[name] for rank in ranks]
        if any(sizes):
            table.add_row(name.replace("_", "-"), *(f"{size / _GIB:.1f}" for size in sizes))
    table.add_section()
    table.add_row("all", *(f"{rank.total / _GIB:.1f}" for rank in ranks))
    room = result.job.gpu.memory
    table.add_row(f"left of {room / _GIB:.1f}", *(f"{(room - rank.total) / _GIB:.1f}" for rank in ranks))
    return table


def _time(result: Outlook) -> Table:
    table = Table(title="a step, seconds", title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("")
    table.add_column("", justify="right")
    table.add_column("", justify="right")
    value = {"value model": result.value.step.seconds, "value model's scoring": result.value.scoring} if result.value else {}
    value |= {"reward model": result.rewards.scoring} if result.rewards else {}
    further = {**value, "scoring": result.scoring, "generation": result.generation, "weights to the servers": result.sync}
    rows = {_PARTS[name]: seconds for name, seconds in result.step.parts.items()} | further
    for name, seconds in rows.items():
        if seconds:
            share = f"{seconds / result.seconds:.1%}" if math.isfinite(result.seconds) else ""
            table.add_row(name, f"{seconds:.3f}" if math.isfinite(seconds) else "for ever", share)
    if result.beside:
        table.add_row("less generation beside training", f"{-result.beside:.3f}", f"{-result.beside / result.seconds:.1%}")
    table.add_section()
    table.add_row("all", f"{result.seconds:.3f}" if math.isfinite(result.seconds) else "for ever", "")
    return table


def _remarks(result: Outlook) -> list[Text]:
    job, servers, gib = result.job, result.servers, _GIB
    kind = "fp8" if job.fp8 else job.dtype
    peak = getattr(job.gpu, kind)
    lines = [
        f"{result.step.tokens / result.seconds / result.gpus:,.0f} tokens/s/GPU; while training "
        f"{result.flops_per_gpu / 1e12:.0f} TFLOP/s/GPU, {result.flops_per_gpu / peak:.0%} of the {kind} peak",
        *(
            [f"the optimizer's state in main memory takes {_size(result.offloaded)} of a node's, all along"]
            if result.offloaded
            else []
        ),
        f"a save takes {_size(result.host)} of a node's main memory, going on from it {_size(result.resume)}; "
        f"{result.storage.size / 1e9:,.0f} GB: {_duration(result.storage.save / 3600)} to be written at "
        f"{result.question.storage / 1e9:g} GB/s (--storage), of which training waits {_duration(result.storage.waits / 3600)}, "
        f"{_duration(result.storage.load / 3600)} to be read",
    ]
    if servers is not None:
        lines.append(
            f"a server's GPU: {servers.weights / gib:.1f} GiB weights, {max(0.0, servers.cache) / gib:.1f} GiB for keys and "
            f"values of {servers.tokens:,} tokens, {servers.sync / gib:.1f} GiB of "
            f"weights as they arrive, beside these"
        )
    if result.hours is not None and math.isfinite(result.hours):
        before = f" (the reference's scoring {_duration(result.once / 3600)} of it)" if result.once else ""
        whole = f"{_duration(result.hours)}, {_duration(result.hours * result.gpus, 'GPU-')}{before}"
        lines.append(f"{result.question.steps:,} steps: {whole}, without start, saves and evaluations")
    elif result.hours is None:
        lines.append("how long the whole stage takes is not known: give --rows, the rows of its data")
    lines.append(
        f"{6 * matmul_parameters(result.question.config) / 1e9:,.1f} GFLOP a token and attention; lengths drawn, not read"
    )
    return [Text(line) for line in lines] + [Text(f"warning: {each}", style="yellow") for each in result.warnings]
