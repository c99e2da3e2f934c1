"""Verifiers as pins: all of their sources, none of which runs."""

from __future__ import annotations

import sys
import zipfile

import pytest

from tulu_mega.errors import UserError
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


def test_an_installed_package_that_a_verifier_is_of_is_pinned_whole(package, monkeypatch):
    """Packages beside it are not: their versions are the environment's."""
    monkeypatch.setattr(code, "_INSTALLED", (package,))
    pin = code.custom({"v": "pinned_pk.mine:judge"})
    names = {"pinned_pk", "pinned_pk.a", "pinned_pk.a.helper", "pinned_pk.b", "pinned_pk.b.helper"}
    assert pin.parts.keys() == {"v:judge", *(f"v:{name}" for name in names)}
    before = Pin("v", {"v:judge": pin.parts["v:judge"]})  # as earlier versions pinned it
    code.adopt(before, pin)
    code.adopt(None, pin)
    assert not differences(before, pin)
    (package / "pinned_pk/a/helper.py").write_text("A = 2\n")
    assert differences(before, code.custom({"v": "pinned_pk.mine:judge"}))
    assert differences(before, code.custom({"w": "pinned_pk.mine:judge"})), "another verifier is another"


def test_the_packages_that_judge_are_part_of_what_judges(monkeypatch):
    monkeypatch.setattr(code, "of_package", lambda name: {"sympy": "1.0", "math_verify": "2.0"}.get(name))
    before = code.built_in(["math"])
    assert {"package sympy", "package math_verify"} <= before.parts.keys() and not differences(before, code.built_in(["math"]))
    assert "package sympy" not in code.built_in(["gsm8k"]).parts
    monkeypatch.setattr(code, "of_package", lambda name: {"sympy": "1.1", "math_verify": "2.0"}.get(name))
    ((_, told),) = differences(before, code.built_in(["math"]), some=True)
    assert told.startswith("the package sympy 1.0 was ") and ", the package sympy 1.1 there is " in told
    lacking = Pin("math", {name: part for name, part in before.parts.items() if not name.startswith("package ")})
    assert not differences(lacking, code.built_in(["math"]), some=True), "a run of before goes on"


def test_a_verifier_in_an_archive_is_refused(tmp_path, monkeypatch):
    with zipfile.ZipFile(tmp_path / "pinned.zip", "w") as archive:
        archive.writestr("pinned_zipped.py", "def judge(*_, **__):\n    return 1.0\n")
    monkeypatch.syspath_prepend(str(tmp_path / "pinned.zip"))
    with pytest.raises(UserError, match=r"rewards.custom: verifier 'v' is made of .*pinned_zipped.py, which cannot be read"):
        code.custom({"v": "pinned_zipped:judge"})
