"""Settings of `tulu-mega report`."""

from __future__ import annotations

from pydantic import field_validator

from tulu_mega.config.sections import PositiveInt, Section


class ReportSettings(Section):
    """`tulu-mega report RUN [RUN2 ...]`"""

    runs: list[str]
    """Run directories, laid over one another. The page appears in the first: report.html, and report/*.png."""
    output: str | None = None
    """Another directory for report.html and report/."""
    samples: PositiveInt = 3
    """Sample responses shown of each evaluated task."""

    @field_validator("runs")
    @classmethod
    def _some(cls, runs: list[str]) -> list[str]:
        if not runs:
            raise ValueError("no run; give at least one run directory, such as: tulu-mega report runs/sft")
        return runs
