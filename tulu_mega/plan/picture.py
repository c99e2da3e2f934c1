"""Memory by rank and a step's timeline, drawn."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

from tulu_mega.errors import UserError
from tulu_mega.plan.model.calibration import RATES
from tulu_mega.plan.model.timing import step_timeline
from tulu_mega.plan.outlook import Outlook
from tulu_mega.plan.table import layout

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLOURS = (
    "#0072b2",
    "#56b4e9",
    "#009e73",
    "#e69f00",
    "#f0e442",
    "#d55e00",
    "#cc79a7",
    "#999999",
    "#8c6d31",
    "#5254a3",
    "#a05000",
    "#303030",
    "#dddddd",
    "#b5cf6b",
    "#e7969c",
    "#9c9ede",
)
_FORWARD, _BACKWARD = "#56b4e9", "#009e73"


def draw(result: Outlook, file: str) -> None:
    """Writes a PNG.

    Raises:
        UserError: matplotlib is not installed, or the file cannot be written.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError("matplotlib is not installed, needed to draw; install tulu_mega[report], or pip install matplotlib")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 7), dpi=150, layout="constrained")
    above, below = figure.subplots(2, 1)
    _memory(above, result)
    _timeline(below, result)
    figure.suptitle(f"{result.question.stage} on {result.gpus} {result.job.gpu.name}, {layout(result.job)}", fontsize=11)
    target = Path(file).expanduser()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(target, format="png", metadata={"Software": None})
    except OSError as error:
        raise UserError(f"{target}: cannot be written ({error.strerror}); name another file with --picture") from None


def _memory(axes: Axes, result: Outlook) -> None:
    """A bar a pipeline rank, parts upon one another, the GPU's memory as a line."""
    ranks = [rank.rank for rank in result.memory]
    bottoms = [0.0] * len(ranks)
    for colour, name in zip(_COLOURS, result.memory[0].parts, strict=True):
        heights = [rank.parts[name] / 2**30 for rank in result.memory]
        if any(heights):
            axes.bar(ranks, heights, bottom=bottoms, color=colour, label=name.replace("_", "-"), width=0.8)
            bottoms = [bottom + height for bottom, height in zip(bottoms, heights, strict=True)]
    axes.axhline(result.job.gpu.memory / 2**30, color="#d00000", linestyle="--", linewidth=1.2, label="of the GPU")
    axes.set_title("memory by pipeline rank", loc="left", fontsize=10)
    axes.set_ylabel("GiB")
    axes.set_xticks(ranks)
    axes.legend(fontsize=7.5, ncols=6, loc="upper center", bbox_to_anchor=(0.5, -0.08), frameon=False)


def _timeline(axes: Axes, result: Outlook) -> None:
    """A line a pipeline rank: forward and backward passes, chunks of a rank in shades; white is waiting."""
    spans = step_timeline(result.job, RATES)
    pipeline, chunks = result.job.parallel.pipeline, result.job.parallel.virtual_pipeline
    for backward, colour, label in ((False, _FORWARD, "forward"), (True, _BACKWARD, "backward")):
        for chunk in range(chunks):
            for rank in range(pipeline):
                own = [s for s in spans if s.rank == rank and s.backward is backward and s.stage // pipeline == chunk]
                axes.broken_barh(
                    [(span.start, span.end - span.start) for span in own],
                    (rank - 0.42, 0.84),
                    facecolor=colour,
                    alpha=1.0 - 0.6 * chunk / chunks,
                    edgecolor="white",
                    linewidth=0.3 if len(spans) < 2000 else 0.0,
                    label=label if rank == chunk == 0 else None,
                )
    axes.set_title("passes of a step, slowest replica", loc="left", fontsize=10)
    axes.set_xlabel("seconds")
    axes.set_ylabel("pipeline rank")
    axes.set_yticks(range(pipeline))
    axes.invert_yaxis()
    axes.legend(fontsize=7.5, ncols=2, loc="lower right", bbox_to_anchor=(1.0, 1.0), frameon=False)
