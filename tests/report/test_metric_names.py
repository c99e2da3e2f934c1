"""The table of metrics against the code that writes them."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tulu_mega.config import PolicySettings
from tulu_mega.objectives.policy import PolicyObjective
from tulu_mega.objectives.preference import dpo, orpo
from tulu_mega.objectives.preference_objective import PreferenceObjective
from tulu_mega.objectives.reward import RewardObjective
from tulu_mega.objectives.sft import SftObjective
from tulu_mega.objectives.value import ValueObjective
from tulu_mega.report.curves import CHARTS
from tulu_mega.report.metric_names import METRICS, known

PACKAGE = Path(__file__).parents[2] / "tulu_mega"
WRITERS = {
    "train/metrics.py": ("_values", "before_first_step"),
    "train/loop.py": ("_evaluated", "_record"),
    "train/save_figures.py": ("tell",),
    "resilience/guards.py": ("after_step",),
    "resilience/stragglers.py": ("figures",),
    "rl/rollouts.py": ("figures",),
    "rl/reporter.py": ("_record",),
    "rl/states.py": ("figures",),
    "rl/actor_critic.py": ("_told",),
}
"""Functions that make a step's figures, by file."""


def written(file: str, functions: tuple[str, ...]) -> set[str]:
    """Texts that are keys of a mapping in some functions of a file."""
    names: set[str] = set()
    for function in ast.walk(ast.parse((PACKAGE / file).read_text(encoding="utf-8"))):
        if isinstance(function, ast.FunctionDef) and function.name in functions:
            for node in ast.walk(function):
                if isinstance(node, ast.Dict):
                    names |= {key.value for key in node.keys if isinstance(key, ast.Constant)}
                elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Subscript):
                    key = node.targets[0].slice
                    names |= {key.value} if isinstance(key, ast.Constant) and isinstance(key.value, str) else set()
    return names


@pytest.mark.parametrize("file", WRITERS)
def test_what_is_written_is_in_the_table(file):
    found = written(file, WRITERS[file])
    assert found, "its functions have other names now"
    assert {name for name in found if not known(name)} == set()


def test_metrics_of_objectives_are_in_the_table():
    names = {*SftObjective.reported, *RewardObjective.reported, *ValueObjective.reported}
    names |= {name for loss in (dpo.Loss(), orpo.Loss()) for name in PreferenceObjective(loss).reported}
    names |= {*PolicyObjective.of(PolicySettings(beta=0.1), 8).reported, *PolicyObjective.largest}
    assert {name for name in names if not known(name)} == set()


def test_metrics_that_are_drawn_are_in_the_table():
    assert {name for chart in CHARTS for name, _ in chart.columns if not known(name)} == set()


def test_names_are_known():
    assert known("zeros_time") and known("heldout_zeros_time") and known("heldout_margin") and not known("los")
    assert all(each.text.endswith(".") and each.stages for each in METRICS.values())
