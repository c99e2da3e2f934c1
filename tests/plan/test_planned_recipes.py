"""docs/reference/planned_recipes.md says what the planner says of the recipes as they are now."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools.plan_recipes import figures, question_of, recipes
from tulu_mega.plan.outlook import outlook

ROOT = Path(__file__).parents[2]
SMALL = ("8b", "7b")
"""Sizes whose figures are made anew each time; those of all would take seconds."""
AGAIN = "python tools/plan_recipes.py --before docs/notes/measurements/2026-11-30-plans-before.json --write " \
    "docs/reference/planned_recipes.md"  # fmt: skip


def told() -> dict[str, dict[str, str]]:
    """Rows of the page by recipe; of cells with two figures the second, which is today's."""
    page = (ROOT / "docs/reference/planned_recipes.md").read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if line.startswith("| ")]
    names = ("gpus", "layout", "recompute", "memory", "seconds", "tflops", "mfu")
    return {name: dict(zip(names, (cell.rpartition("→")[2].strip() for cell in cells), strict=True))
            for name, *cells, _ in rows if "/" in name}  # fmt: skip


@pytest.fixture
def here(monkeypatch):
    monkeypatch.chdir(ROOT)


def test_the_page_has_every_recipe_as_it_is(here):
    rows, files = told(), list(recipes())
    assert list(rows) == ["/".join(file.parts[1:]).removesuffix(".toml") for file in files], AGAIN
    for file, row in zip(files, rows.values(), strict=True):
        question = question_of(file)
        settings, model = question.settings, question.settings.model
        sizes = dict(TP=settings.parallel.tensor, PP=settings.parallel.pipeline, VPP=settings.parallel.virtual_pipeline)
        layout = [f"{name}{size}" for name, size in sizes.items() if size > 1]
        assert row["layout"].split()[: len(layout)] == layout, (file, AGAIN)
        assert row["recompute"] == (model.recompute if isinstance(model.recompute, str) else "+".join(model.recompute)), AGAIN
        assert int(row["gpus"]) == question.trainers + (question.servers.gpus if question.servers else 0), (file, AGAIN)


def test_the_figures_of_small_models_are_today_s(here):
    rows = told()
    for file in (file for file in recipes() if file.parts[-2] in SMALL):
        now, row = figures(outlook(question_of(file))), rows["/".join(file.parts[1:]).removesuffix(".toml")]
        assert row["memory"] == f"{now['memory'] / 2**30:.1f}", (file, AGAIN)
        assert (row["seconds"], row["tflops"], row["mfu"]) == (
            f"{now['seconds']:.2f}", f"{now['tflops']:.0f}", f"{now['mfu']:.0%}",
        ), (file, AGAIN)  # fmt: skip
