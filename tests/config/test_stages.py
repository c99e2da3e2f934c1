"""Descriptors of stages name what is there, and each settings object has its own."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tulu_mega import cli
from tulu_mega.config import RunSettings, describe
from tulu_mega.config.stages import DEFAULT, STAGES, stage_of
from tulu_mega.config.workload import Workload
from tulu_mega.launch.launcher import resolve

COMMON = {"model": "m", "run_dir": "r", "data": {"train": "d"}}
NEEDED = {"ppo": {"value": {"path": "v"}}}
"""What a stage cannot do without besides."""


@pytest.mark.parametrize("name", STAGES)
def test_a_descriptor_names_what_is_there(name):
    stage = STAGES[name]
    kind = resolve(stage.settings)
    settings = kind.model_validate(COMMON | NEEDED.get(name, {}))
    assert stage.name == name and issubclass(kind, RunSettings)
    assert stage_of(settings) is stage and cli.command_of(settings).stage is stage
    for code in (stage.problems, stage.workload, *filter(None, (stage.companions, stage.restarts))):
        assert callable(resolve(code))
    assert isinstance(resolve(stage.workload)(settings), Workload)
    known = [row[0] for row in describe(kind)]
    assert all(mark in known for mark in (*stage.marks, *stage.hints))
    assert all(any(setting.startswith(f"{section}.") for setting in known) for section in stage.sections)


def test_a_section_tells_one_stage():
    sections = [section for stage in STAGES.values() for section in stage.sections]
    assert len(sections) == len(set(sections)) and DEFAULT in STAGES


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_a_command_is_found_by_its_settings(name):
    command = cli.COMMANDS[name]
    assert cli.command_of(resolve(command.settings).model_construct()) is command
    assert not command.problems or callable(resolve(command.problems))


def test_descriptors_are_read_without_pydantic():
    code = "import sys, tulu_mega.config.stages; sys.exit('pydantic' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_package_has_what_it_offers():
    import tulu_mega.config as config

    assert all(getattr(config, name) for name in config.__all__)
    with pytest.raises(AttributeError, match="no attribute 'NoSettings'"):
        _ = config.NoSettings
