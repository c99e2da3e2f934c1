"""Verifiers as pins: all of their sources, none of which runs."""

from __future__ import annotations

import sys

import pytest

from tulu_mega.pins import code
from tulu_mega.pins.compare import Pinning, differences
from tulu_mega.pins.record import Pin, Pins


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A verifier that imports two files of one name, a script, and a package that fails."""
    files = {
        "pinned_pk/__init__.py": "",
        "pinned_pk/mine.py": "from pinned_pk.a import helper\nfrom pinned_pk.b import helper as other\n"
        "def judge(*_, **__):\n    import pinned_boom.x\n    from pinned_script import go\n",
        "pinned_pk/a/__init__.py": "",
        "pinned_pk/a/helper.py": "A = 1\n",
        "pinned_pk/b/__init__.py": "",
        "pinned_pk/b/helper.py": "B = 1\n",
        "pinned_boom/__init__.py": "raise RuntimeError('not here')\n",
        "pinned_script.py": f"open({str(tmp_path / 'ran')!r}, 'w').close()\nraise SystemExit(3)\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for name in [each for each in sys.modules if each.startswith(("pinned_pk", "pinned_boom"))]:
        del sys.modules[name]


@pytest.mark.parametrize("changed", ["pinned_pk/mine.py", "pinned_pk/a/helper.py", "pinned_pk/b/helper.py", "pinned_script.py"])
def test_every_file_is_pinned_and_none_runs(package, changed):
    before = code.custom({"v": "pinned_pk.mine:judge"})
    file = package / changed
    file.write_text(file.read_text() + "# another\n")
    ((_, told),) = differences(before, code.custom({"v": "pinned_pk.mine:judge"}))
    assert str(file) in told and not (package / "ran").exists()


def test_the_sandbox_is_part_of_what_judges_programs():
    names = code.built_in(["python_code"]).parts
    assert {"rewards/sandbox.py", "rewards/sandboxed/evaluate.py", "rewards/sandboxed/values.py"} <= names.keys()


def test_accepting_one_verifiers_change_keeps_the_pins_of_others(tmp_path):
    both, one = code.built_in(["math", "python_code"]), code.built_in(["math"])
    pins = Pins({"rewards.verifiers": both}, [])
    one.parts["rewards/verifiers/math.py"].digest = "0" * 64
    Pinning(tmp_path, pins, ["rewards.verifiers"]).settle("rewards.verifiers", Pin("math", one.parts), some=True)
    assert both.parts.keys() <= pins.pins["rewards.verifiers"].parts.keys()
