"""`tulu-mega report`: reads runs, draws their curves and writes one page that needs nothing beside it."""

from __future__ import annotations

import base64
import json
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import cache
from importlib import resources
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from tulu_mega import __version__
from tulu_mega.errors import UserError
from tulu_mega.report.curves import Drawing, constants, draw
from tulu_mega.report.profiles import Profile
from tulu_mega.report.read import Run, read_runs
from tulu_mega.report.settings import ReportSettings

if TYPE_CHECKING:
    from jinja2 import Template

PAGE, PICTURES = "report.html", "report"


def run(settings: ReportSettings) -> None:
    """Writes report.html and report/*.png into the first run's directory, or where `settings.output` says.

    Raises:
        UserError: a run without metrics, matplotlib is missing, or the page cannot be written.
    """
    runs = read_runs(settings.runs, settings.samples)
    drawings = draw(runs)
    directory = Path(settings.output).expanduser() if settings.output else runs[0].directory
    try:
        pictures = directory / PICTURES
        pictures.mkdir(parents=True, exist_ok=True)
        for drawing in drawings:
            (pictures / f"{drawing.chart.name}.png").write_bytes(drawing.png)
        temporary = directory / f".{PAGE}"
        temporary.write_text(page(runs, drawings, directory), encoding="utf-8")
        temporary.replace(directory / PAGE)
    except OSError as error:
        raise UserError(f"{directory}: cannot be written ({error.strerror}); name another directory with --output") from None
    for run in runs:
        for note in run.notes:
            print(f"warning: {run.directory}: {note}", file=sys.stderr)
    print(f"{directory / PAGE}; {len(drawings)} pictures in {pictures}")


def page(runs: Sequence[Run], drawings: Sequence[Drawing], directory: Path) -> str:
    """The page as HTML, pictures inside.

    Args:
        directory: where it will lie; it refers to nothing but traces of profiles, which are too large to be inside.
    """
    flat = [_flat(run.settings) for run in runs]
    names = list(dict.fromkeys(name for one in flat for name in one))
    return _template().render(
        title=f"Training report: {', '.join(run.name for run in runs)}",
        made=f"tulu_mega {__version__}, {datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        notes=[f"{run.name}: {note}" for run in runs for note in run.notes],
        several=len(runs) > 1,
        summary=[{"name": run.name, "figures": summary(run)} for run in runs],
        drawings=[{"data": base64.b64encode(one.png).decode(), "text": one.text} for one in drawings],
        constants=constants(runs),
        scores=[score for run in runs for score in _scores(run)],
        profiles=[_profile(run, each, directory, len(runs) > 1) for run in runs for each in run.profiles],
        samples=[sample for run in runs for sample in _samples(run, len(runs) > 1)],
        differences=[(name, [one.get(name, "") for one in flat]) for name in names if len({one.get(name) for one in flat}) > 1],
        settings=[{"name": run.name, "rows": list(one.items())} for run, one in zip(runs, flat, strict=True)],
    )


@cache
def _template() -> Template:
    from jinja2 import Environment

    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(resources.files("tulu_mega.report").joinpath("page.html.j2").read_text(encoding="utf-8"))


def summary(run: Run) -> dict[str, str]:
    """A run in figures, as text. Rates are medians over its second half, when everything is warm."""

    def last(name: str, form: str) -> str:
        values = run.column(name)[1]
        return format(values[-1], form) if values else "–"

    def typical(name: str, form: str, scale: float = 1.0) -> str:
        values = run.column(name)[1]
        return format(median(values[len(values) // 2 :]) * scale, form) if values else "–"

    def most(name: str, form: str) -> str:
        values = run.column(name)[1]
        return format(max(values), form) if values else "–"

    parts = {name for row in run.steps for name in row if name.startswith("seconds_")}
    minutes, rest = divmod(round(sum(sum(run.column(name)[1]) for name in parts)), 60)
    hours, minutes = divmod(minutes, 60)
    tokens = sum(run.column("tokens")[1])
    return {
        "steps": f"{run.steps[-1]['step']:,}",
        "tokens": f"{tokens:,.0f}",
        "time": f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s",
        "last loss": last("loss", ".4g"),
        "tokens a second": typical("tokens_per_second", ",.0f"),
        "MFU": typical("mfu", ".1f", 100) + _of_peak(run),
        "padding": typical("padding", ".1f", 100) + " %",
        "memory": last("memory_gib", ".2f") + " GiB" + _reserved(run),
        "a save": typical("save_seconds", ",.1f") + " s, " + most("save_memory_gib", ".2f") + " GiB",
        "skipped steps": last("skipped_steps", ".0f"),
    }


def _of_peak(run: Run) -> str:
    """Return the peak that an MFU is a share of; older runs do not name it."""
    peak = run.steps[-1].get("mfu_peak")
    return "" if not run.column("mfu")[1] else f" % of the {peak} peak" if isinstance(peak, str) else " %"


def _reserved(run: Run) -> str:
    values = run.column("memory_reserved_gib")[1]
    return f" ({values[-1]:.2f} reserved)" if values else ""


def _flat(values: dict[str, Any], section: str = "") -> dict[str, str]:
    """Settings by dotted name, values as text."""
    flat: dict[str, str] = {}
    for name, value in values.items():
        if isinstance(value, dict) and value:
            flat |= _flat(value, f"{section}{name}.")
        else:
            flat[f"{section}{name}"] = "not set" if value is None else value if isinstance(value, str) else json.dumps(value)
    return flat


def _profile(run: Run, profile: Profile, page: Path, several: bool) -> dict[str, Any]:
    operations = [
        {"name": each.name, "time": f"{each.milliseconds:,.1f}", "share": f"{each.share:.1%}", "calls": f"{each.calls:,}"}
        for each in profile.operations
    ]
    return {
        "title": f"{run.name}, {profile.title}" if several else profile.title,
        "device": "CPU" if profile.device == "cpu" else f"{profile.device.upper()} device",
        "link": profile.link(page),
        "file": profile.trace.name,
        "operations": operations,
    }


def _scores(run: Run) -> list[dict[str, str]]:
    rows = []
    for evaluation in run.evaluations:
        for name, task in evaluation.tasks.items():
            for metric, value in task.get("metrics", {}).items():
                rows.append(
                    {
                        "run": run.name,
                        "evaluation": evaluation.name,
                        "task": task.get("title", name),
                        "metric": metric.replace("_", " "),
                        "value": f"{value['value']:.1%}",
                        "interval": f"{value['low']:.1%} to {value['high']:.1%}",
                        "problems": f"{task.get('problems', '–')}",
                        "cut_off": f"{task.get('cut_off', '–')}",
                    }
                )
    return rows


def _samples(run: Run, several: bool) -> list[dict[str, str]]:
    found = []
    for evaluation in run.evaluations:
        for task, records in evaluation.samples.items():
            for record in records:
                first = record["responses"][0]
                scores = first.get("scores") or {}
                value = next(iter(scores.values()), None)
                title = evaluation.tasks.get(task, {}).get("title", task)
                where = f"{run.name}, " if several else ""
                found.append(
                    {
                        "title": f"{where}{evaluation.name}, {title}, problem {record.get('problem', 0) + 1}",
                        "verdict": "not judged"
                        if value is None
                        else "right"
                        if value in (1, 1.0)
                        else "wrong"
                        if value == 0
                        else f"{value}",
                        "question": record["messages"][-1]["content"],
                        "response": first["response"] + (" […]" if first.get("finish_reason") == "length" else ""),
                        "answer": record.get("answer")
                        if isinstance(record.get("answer"), str)
                        else json.dumps(record.get("answer")),
                        "detail": first.get("detail") or first.get("error") or "",
                    }
                )
    return found + [_rollout(run, record, several) for record in run.rollouts]


def _rollout(run: Run, record: dict[str, Any], several: bool) -> dict[str, str]:
    """A response that was trained on, or left out, as a sample of the page."""
    where = f"{run.name}, " if several else ""
    reward, advantage = record.get("reward"), record.get("advantage", 0.0)
    trained = f"advantage {advantage:+.2f}" if record.get("trained") else "not trained on"
    judged = record.get("verdict_reward", reward)
    given = "" if judged == reward else f" in the place of {'none' if judged is None else format(judged, 'g')}"
    answer = record.get("ground_truth")
    return {
        "title": f"{where}step {record['step']}, prompt {record.get('place', 0) + 1}, response {record.get('sample', 0) + 1}",
        "verdict": "not judged" if reward is None else f"reward {reward:g}{given}, {trained}",
        "question": record["messages"][-1]["content"],
        "response": record["response"] + (" […]" if record.get("finish_reason") == "length" else ""),
        "answer": answer if isinstance(answer, str) else json.dumps(answer),
        "detail": record.get("detail") or record.get("error") or "",
    }
