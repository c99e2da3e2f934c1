"""Draws the curves of runs. Only this file and plan/picture.py import matplotlib."""

from __future__ import annotations

import importlib.util
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import TYPE_CHECKING

from tulu_mega.errors import UserError
from tulu_mega.report.read import Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MAX_POINTS = 1500
"""Largest number of points drawn of a curve; more would be more than pixels."""
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#999999", "#8c564b")
"""The colours of Okabe and Ito, which colour-blind readers can tell apart, and two more: one for each column of the
widest chart."""
_FEW = 10
"""A curve of at most this many values, such as of evaluations, has a mark for each."""
_DASHES = ("-", "--", "-.", ":")
_LONG_S = 10.0
"""Seconds of a step from which on times are given in seconds instead of milliseconds."""
_FLAT = 0.01
"""Relative difference below which a curve is drawn as flat."""


@dataclass(frozen=True)
class Chart:
    """What a chart shows."""

    name: str
    """file name"""
    title: str
    unit: str
    columns: tuple[tuple[str, str], ...]
    """metric and label; several are stacked as areas when there is one run"""
    scale: float = 1.0
    """factor from the metric to the unit"""
    log: bool = False
    usual: float | None = None
    """what the metric is while there is nothing to see: told in words then"""
    zero: bool = False
    """whether it is an amount, drawn from 0; others fill the chart, since a loss that falls from 2.3 to 2.2 looks flat from 0"""
    by_kind: bool = False
    """whether it means something else under each `Run.kind`, and so has a chart for each"""
    kind: str | None = None
    """the kind whose runs it shows; all of them when None"""


@dataclass(frozen=True)
class Drawing:
    """A drawn chart: PNG, and in words for who cannot see it."""

    chart: Chart
    png: bytes
    text: str


CHARTS = (
    Chart("loss", "Loss", "as the recipe reduces it", (("loss", "loss"),), by_kind=True),
    Chart("nll", "Negative log-likelihood", "nats per supervised token", (("nll", "nll"),)),
    Chart(
        "heldout_loss",
        "Held-out loss",
        "mean of the trained tokens, or pairs",
        (("heldout_loss", "held-out loss"),),
        by_kind=True,
    ),
    Chart("accuracy", "Pairs told apart", "% of the pairs", (("accuracy", "accuracy"),), scale=100),
    Chart("heldout_accuracy", "Held-out pairs told apart", "% of the pairs", (("heldout_accuracy", "accuracy"),), scale=100),
    Chart("margin", "Margin", "mean difference of rewards", (("margin", "margin"),), by_kind=True),
    Chart("heldout_margin", "Held-out margin", "mean difference of rewards", (("heldout_margin", "margin"),), by_kind=True),
    Chart("reward", "Reward", "mean of the responses", (("reward", "reward"),)),
    Chart("solve_rate", "Solved", "% of the responses", (("solve_rate", "solved"),), scale=100),
    Chart(
        "heldout_solve_rate",
        "Held-out problems solved",
        "% of the greedy answers",
        (("heldout_solve_rate", "solved"),),
        scale=100,
    ),
    Chart("response_length", "Response length", "tokens", (("response_length", "mean"),), zero=True),
    Chart("truncated", "Cut off", "% of the responses", (("truncated", "cut off"),), scale=100, usual=0),
    Chart("entropy", "Entropy of the policy", "nats a token", (("entropy", "entropy"),), zero=True),
    Chart(
        "kl",
        "Distance from the reference",
        "nats: of pairs a response, of policies a token",
        (("kl", "KL estimate"),),
        by_kind=True,
    ),
    Chart("kl_reward", "Divergence in the reward", "mean of a response's sum", (("kl_reward", "penalty"),)),
    Chart("value_loss", "Loss of the value model", "as the recipe reduces it", (("value_loss", "loss"),), zero=True),
    Chart("explained_variance", "Explained variance", "of the returns, by the values", (("explained_variance", "share"),)),
    Chart("returns", "Returns", "mean of the states", (("returns", "returns"),)),
    Chart("values", "Values", "mean of the states", (("values", "values"),)),
    Chart(
        "advantages",
        "Spread of the advantages",
        "standard deviation of the tokens, before whitening",
        (("advantage_deviation", "deviation"),),
        zero=True,
    ),
    Chart(
        "value_grad_norm",
        "Gradient norm of the value model",
        "before clipping",
        (("value_grad_norm", "gradient norm"),),
        log=True,
    ),
    Chart(
        "sampler_difference",
        "Sampler against trainer",
        "|log-probability difference|",
        (("sampler_difference", "mean"),),
        zero=True,
    ),
    Chart("lag", "Age of the responses", "steps, mean", (("policy_lag", "mean"),), usual=0, zero=True),
    Chart("lag_max", "Age of the oldest response", "steps", (("policy_lag_max", "largest"),), usual=0, zero=True),
    Chart(
        "effective_samples",
        "Effective sample size",
        "% of the trained tokens",
        (("effective_samples", "ratios of trainer to sampler"),),
        scale=100,
    ),
    Chart("grad_norm", "Gradient norm", "before clipping", (("grad_norm", "gradient norm"),), log=True, zero=True),
    Chart("adapter_norm", "Norm of the adapters", "of A and B together", (("adapter_norm", "norm"),)),
    Chart("lr", "Learning rate", "", (("lr", "learning rate"),), zero=True),
    Chart("throughput", "Throughput", "1,000 tokens/s, all processes", (("tokens_per_second", "tokens"),), scale=1e-3, zero=True),
    Chart(
        "generation",
        "Generation",
        "1,000 tokens/s, all servers",
        (("generated_tokens_per_second", "tokens"),),
        scale=1e-3,
        zero=True,
    ),
    Chart("mfu", "Share of the peak (MFU)", "% of the dense peak of the model's dtype", (("mfu", "MFU"),), scale=100),
    Chart("padding", "Padding", "% of the packed positions", (("padding", "padding"),), scale=100, usual=0),
    Chart(
        "schedule",
        "Schedule efficiency",
        "% of the ranks' time, simulated",
        (("schedule_efficiency", "work"),),
        scale=100,
        usual=1,
    ),
    Chart(
        "time",
        "Where the time went",
        "ms a step",
        (
            ("seconds_forward_backward", "forward and backward"),
            ("seconds_optimizer", "optimizer"),
            ("seconds_data", "data"),
            ("seconds_checkpoint", "checkpoint"),
            ("seconds_generation", "generation"),
            ("seconds_rewards", "rewards"),
            ("seconds_scoring", "scoring"),
            ("seconds_sync", "weights to the servers"),
            ("seconds_evaluation", "evaluation"),
        ),
        scale=1000,
        zero=True,
    ),
    Chart("memory", "Memory", "GiB, peak so far of process 0", (("memory_gib", "memory"),)),
    Chart("reserved", "Memory reserved", "GiB, peak so far of process 0", (("memory_reserved_gib", "reserved"),)),
    Chart("save_memory", "Memory of a save", "GiB above what was held, largest of all", (("save_memory_gib", "peak"),)),
    Chart("save_seconds", "Seconds of a save", "s until it counts", (("save_seconds", "save"),), zero=True),
    Chart("skipped", "Skipped steps", "steps so far", (("skipped_steps", "skipped"),), usual=0, zero=True),
)
"""In the order of the page. A chart no run has values for is left out."""
_UNDRAWN = {
    "step", "tokens", "supervised_tokens", "supervised_tokens_per_second", "tflops", "sequences", "generated_tokens", "responses",
    "slowest_rank", "save_waited_seconds", "seconds_servers",
}  # fmt: skip


def draw(runs: Sequence[Run]) -> list[Drawing]:
    """Draw every chart that some run has values for.

    Raises:
        UserError: matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError("matplotlib is not installed, needed to draw; install tulu_mega[report], or pip install matplotlib")
    charts = [_in_its_unit(each, runs) for chart in [*CHARTS, *_others(runs)] for each in _kinds(chart, runs)]
    return [drawing for chart in charts if (drawing := _draw(chart, runs)) is not None]


def _kinds(chart: Chart, runs: Sequence[Run]) -> list[Chart]:
    """The chart, or one for each kind of the runs that it shows."""
    kinds = list(dict.fromkeys(run.kind for run in runs if run.column(chart.columns[0][0])[0]))
    if not chart.by_kind or len(kinds) < 2:
        return [chart]
    titles = {kind: f"{chart.title}: {kind or 'others'}" for kind in kinds}
    return [replace(chart, name=f"{chart.name}_{_file(kind)}", title=title, kind=kind) for kind, title in titles.items()]


def _in_its_unit(chart: Chart, runs: Sequence[Run]) -> Chart:
    """The chart in seconds where it would go up to tens of thousands of milliseconds."""
    if not chart.unit.startswith("ms "):
        return chart
    longest = max((value for run in _shown(chart, runs).values() for value in _total(chart, run)[1]), default=0.0)
    return replace(chart, unit=chart.unit.replace("ms", "s", 1), scale=1.0) if longest >= _LONG_S else chart


def _shown(chart: Chart, runs: Sequence[Run]) -> dict[int, Run]:
    """The runs that a chart shows, by their number among all, which decides their colour."""
    first = chart.columns[0][0]
    return {number: run for number, run in enumerate(runs) if run.column(first)[0] and chart.kind in (None, run.kind)}


def constants(runs: Sequence[Run]) -> list[str]:
    """Describe the metrics that never changed, and so are not drawn, with their values."""
    usual = [f"{chart.title.lower()} {chart.usual}" for chart in CHARTS if _as_usual(chart, runs)]
    further = _further(runs).items()
    return usual + [f"{_title(name).lower()} {values[0]:.4g}" for name, values in further if _never_changes(values)]


def _others(runs: Sequence[Run]) -> list[Chart]:
    """A chart for each further metric that a recipe reports and that changes, in the order of their names."""
    names = [name for name, values in _further(runs).items() if not _never_changes(values)]
    return [Chart(_file(name), _title(name), "", ((name, name),)) for name in names]


def _file(name: str) -> str:
    return re.sub(r"[^\w.-]+", "_", name) or "others"


def _further(runs: Sequence[Run]) -> dict[str, list[float]]:
    """Metrics that none of `CHARTS` shows, in the order of their names, with all values of all runs."""
    known = _UNDRAWN | {name for chart in CHARTS for name, _ in chart.columns}
    names = {name for run in runs for row in run.steps for name, value in row.items() if isinstance(value, int | float)} - known
    return {name: [value for run in runs for value in run.column(name)[1]] for name in sorted(names)}


def _as_usual(chart: Chart, runs: Sequence[Run]) -> bool:
    return {value for run in runs for name, _ in chart.columns for value in run.column(name)[1]} == {chart.usual}


def _never_changes(values: Sequence[float]) -> bool:
    """Return whether a metric has several values that are all the same."""
    return len(values) > 1 and len(set(values)) == 1


def _title(metric: str) -> str:
    return metric.replace("heldout_", "held-out ").replace("_", " ").capitalize()


def _draw(chart: Chart, runs: Sequence[Run]) -> Drawing | None:
    seen = _shown(chart, runs)
    if not seen or _as_usual(chart, runs):
        return None
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.8, 3.0), dpi=200, layout="constrained")
    axes = figure.subplots()
    if len(chart.columns) > 1 and len(runs) == 1:
        _stack(axes, chart, runs[0])
    else:
        for number, run in seen.items():
            _curve(axes, chart, run, _COLOURS[number % len(_COLOURS)], _DASHES[number // len(_COLOURS) % len(_DASHES)])
    _dress(axes, chart, legend=len(runs) > 1 or len(chart.columns) > 1)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return Drawing(chart, buffer.getvalue(), _words(chart, list(seen.values())))


def _curve(axes: Axes, chart: Chart, run: Run, colour: str, dash: str) -> None:
    """One run: the values thinly, their running median over them where they are many."""
    steps, values = _total(chart, run)
    values = [value * chart.scale for value in values]
    thick = _thinned(steps, values)
    if len(steps) > 50 and chart.name not in ("lr", "memory", "reserved", "skipped"):
        axes.plot(*thick, color=colour, alpha=0.3, linewidth=0.7)
        thick = _smoothed(steps, values)
    marker = "o" if len(steps) <= _FEW else None
    axes.plot(*thick, dash, color=colour, linewidth=1.5, label=run.name, marker=marker, clip_on=False)


def _stack(axes: Axes, chart: Chart, run: Run) -> None:
    """Draw the smoothed parts of one run's steps, stacked. A part that never takes time is left out."""
    steps = run.column(chart.columns[0][0])[0]
    thin = _smoothed if len(steps) > 50 else _thinned
    labels, colours, heights = [], [], []
    for colour, (name, label) in zip(_COLOURS, chart.columns, strict=False):
        known = dict(zip(*run.column(name), strict=True))
        values = [known.get(step, 0.0) * chart.scale for step in steps]
        if any(values):
            positions, height = thin(steps, values)
            labels.append(label)
            colours.append(colour)
            heights.append(height)
    if heights:
        axes.stackplot(positions, *heights, labels=labels, colors=colours, alpha=0.8)


def _total(chart: Chart, run: Run) -> tuple[list[int], list[float]]:
    """Steps and the sum of a chart's columns."""
    steps, values = run.column(chart.columns[0][0])
    for name, _ in chart.columns[1:]:
        known = dict(zip(*run.column(name), strict=True))
        values = [value + known.get(step, 0.0) for step, value in zip(steps, values, strict=True)]
    return steps, values


def _dress(axes: Axes, chart: Chart, legend: bool) -> None:
    from matplotlib.ticker import LogFormatter, MaxNLocator

    axes.set_title(chart.title, fontsize=10, loc="left", fontweight="bold")
    axes.set_xlabel("step", fontsize=8.5)
    axes.set_ylabel(chart.unit, fontsize=8.5)
    axes.tick_params(labelsize=8.5, which="both")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    low, high = axes.get_ylim()
    if chart.log and low > 0 and high / low > 20:
        axes.set_yscale("log")
        for which in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
            which(LogFormatter(minor_thresholds=(2, 0.5)))  # 6, 20: not 6 x 10^0
    elif chart.unit.startswith("%"):
        axes.set_ylim(0, max(high, 1.0))  # a thousandth of a percent is not worth a mountain range
    elif chart.zero:
        axes.set_ylim(bottom=0)
    elif high - low < _FLAT * max(abs(low), abs(high)):  # nor is the last digit of a float
        middle, half = (low + high) / 2, _FLAT * max(abs(low), abs(high)) / 2
        axes.set_ylim(middle - half, middle + half)
    if legend and axes.collections:  # a stack leaves no free corner
        axes.figure.legend(loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    elif legend:
        axes.legend(fontsize=8, framealpha=0.85, edgecolor="none")


def _thinned(steps: list[int], values: list[float]) -> tuple[list[int], list[float]]:
    stride = -(-len(steps) // MAX_POINTS)
    return steps[::stride], values[::stride]


def _smoothed(steps: list[int], values: list[float]) -> tuple[list[int], list[float]]:
    """Running median over about a thirtieth of the run, which a spike does not move; as many points as are drawn."""
    half = max(2, len(values) // 60)
    places = range(0, len(steps), -(-len(steps) // MAX_POINTS))
    return [steps[at] for at in places], [median(values[max(0, at - half) : at + half + 1]) for at in places]


def _words(chart: Chart, runs: Sequence[Run]) -> str:
    """A sentence for each run: from, to, lowest and highest."""
    sentences = []
    for run in runs:
        steps, values = _total(chart, run)
        values = [value * chart.scale for value in values]
        start, end, low, high = (f"{value:.4g}" for value in (values[0], values[-1], min(values), max(values)))
        sentences.append(f"{run.name}: {start} at step {steps[0]}, {end} at step {steps[-1]}, lowest {low}, highest {high}.")
    unit = f" ({chart.unit})" if chart.unit else ""
    return f"{chart.title}{unit}. {' '.join(sentences)}"
