"""What programs may import changes only with a line in the changelog."""

from __future__ import annotations

import importlib
import importlib.util
import json
from pathlib import Path

import pytest

import tulu_mega

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("public_surface", ROOT / "tools/public_surface.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_change_of_signatures_has_a_line_in_the_changelog(tool):
    committed = json.loads(tool.FILE.read_text(encoding="utf-8"))
    remedy = 'write a line in CHANGELOG.md and run python tools/public_surface.py "THE LINE"'
    assert tool.surface() == committed["surface"], remedy
    line, found = list(committed["changes"].items())[-1]
    assert found == tool.digest(committed["surface"]), remedy
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert [each for each in committed["changes"] if each not in changelog] == []
    assert line


def test_the_tool_wants_a_line_of_its_own_for_each_change(tool, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tool, "ROOT", tmp_path)
    monkeypatch.setattr(tool, "FILE", tmp_path / "surface.json")
    (tmp_path / "CHANGELOG.md").write_text("- one\n- two\n")
    monkeypatch.setattr(tool, "surface", lambda: {"main": ["()"]})
    assert tool.main(["three"]) == 2 and "no line with 'three'" in capsys.readouterr().err
    assert tool.main(["- one"]) == 0 and tool.main(["- one"]) == 0  # nothing changed since
    monkeypatch.setattr(tool, "surface", lambda: {"main": ["(argv)"]})
    assert tool.main(["- one"]) == 2 and "another change" in capsys.readouterr().err
    assert tool.main(["- two"]) == 0
    assert list(json.loads((tmp_path / "surface.json").read_text())["changes"]) == ["- one", "- two"]


def test_names_come_from_where_they_are_defined():
    """Those that bring no megatron-core; the others are imported by the examples' test, in ranks."""
    for name in ("main", "load", "SftSettings", "UserError", "World", "LossOutput", "VerifierPool", "IGNORE"):
        module, _, attribute = tulu_mega.PUBLIC[name].partition(":")
        assert getattr(tulu_mega, name) is getattr(importlib.import_module(module), attribute)
    assert set(tulu_mega.PUBLIC) <= set(dir(tulu_mega))
    with pytest.raises(AttributeError, match="has no attribute 'Enginee'; PUBLIC lists"):
        tulu_mega.Enginee  # noqa: B018
