"""The Dockerfile, as far as no engine is needed: what it asks pip for, what it imports, what it copies."""

from __future__ import annotations

import ast
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest
import setuptools
from packaging.requirements import Requirement

from tulu_mega.cli import COMMANDS
from tulu_mega.inference.command_line import ServerOptions, command
from tulu_mega.inference.offline import Generator
from tulu_mega.outside.versions import ENGINE, TOGETHER
from tulu_mega.platforms.releases import Environment, untried, wrong
from tulu_mega.vllm_plugin import gate

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "Dockerfile").read_text(encoding="utf-8")


def instructions() -> list[tuple[str, str]]:
    """Its instructions in order, each of one line."""
    lines = "\n".join(line for line in TEXT.splitlines() if not line.startswith("#"))
    found = (line.partition(" ") for line in re.sub(r"\\\n\s*", " ", lines).splitlines() if line.strip())
    return [(name, rest.strip()) for name, _, rest in found]


def commands() -> list[list[str]]:
    """The commands of its RUN lines, as words."""
    lines = [part for name, rest in instructions() if name == "RUN" for part in re.split(r"\s&&\s", rest)]
    return [shlex.split(line) for line in lines]


def asked() -> list[list[str]]:
    """What each `pip install` is asked for, options included."""
    return [words[words.index("install") + 1 :] for words in commands() if "pip" in words]


def imports() -> set[str]:
    """Modules that it imports to see whether it is whole."""
    (code,) = (words[-1] for words in commands() if words[:2] == ["python", "-c"] and words[-1].startswith("import "))
    return {alias.name for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Import) for alias in node.names}


def imported_by(file: str) -> set[str]:
    """Modules of other packages that a file of ours imports, by whichever way."""
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    calls = (node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"))
    named = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)} | {call.args[0].value for call in calls}
    return {name for name in named if name.startswith("vllm.")}


def test_it_imports_what_ranks_and_servers_import(monkeypatch):
    ranks = {each.run.partition(":")[0] for each in COMMANDS.values() if each.world}
    words = command(ServerOptions("DIR", extra=tuple(gate.server_arguments())), 0, on_cpu=False)
    plugged = {word.rpartition(".")[0] for word in words if re.fullmatch(r"tulu_mega\.vllm_plugin\.\w+\.\w+", word)}
    started = {word for word in words if word.startswith("tulu_mega.") and word.count(".") == 2}
    (points,) = (lines for name, lines in setup()["entry_points"].items() if name == "vllm.general_plugins")
    plugin = {line.partition("=")[2].partition(":")[0].strip() for line in points}
    own = started | {Generator.__module__.replace("offline", "engine"), COMMANDS["serve"].run.partition(":")[0]}
    assert len(ranks) == 6 and len(plugged) == 5 and len(started) == len(plugin) == 1
    assert imports() == ranks | plugged | plugin | own | imported_by("tulu_mega/vllm_plugin/api_server.py")


def setup() -> dict:
    """What setup.py gives to setuptools."""
    given: dict = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setuptools, "setup", lambda **arguments: given.update(arguments))
        runpy.run_path(str(ROOT / "setup.py"))
    return given


def test_ranks_and_servers_are_of_one_environment_and_pip_is_held_to_nothing_else():
    names = [name for name, _ in instructions()]
    environ = " ".join(rest for name, rest in instructions()[: names.index("RUN")] if name == "ENV").split()
    assert "PIP_CONSTRAINT=" in environ, "before the first pip"
    assert sum("venv" in words for words in commands()) == 1, "one environment"
    every, build, engine = asked()
    assert every == [".[gpu,report,wandb]"] and {"setuptools", "wheel", "ninja"} == {*build}
    assert engine[0] == "--no-build-isolation"
    given, ours = Requirement(engine[1]), Requirement(ENGINE)
    assert given.name == ours.name and given.extras == ours.extras
    (pin,) = given.specifier
    assert pin.operator == "==" and pin.version in ours.specifier
    (base,) = (rest for name, rest in instructions() if name == "FROM")
    major = re.search(r"ARG CUDA=(\d+)\.", TEXT)[1]
    assert f"core_cu{major}" in given.extras and base.startswith("nvidia/cuda:${CUDA}-cudnn-devel")


def test_its_files_are_there_and_its_run_line_reaches_other_machines(tmp_path):
    for name, rest in instructions():
        if name == "COPY":
            assert all((ROOT / source).exists() for source in rest.split()[:-1])
    (line,) = re.findall(r"#   docker run (--gpus all --ipc host.*?)\n#\n", TEXT, re.S)
    assert all(flag in line for flag in ("--network host", "--cap-add IPC_LOCK", "--device /dev/infiniband", "memlock=-1"))


def copied(directory: Path) -> Path:
    """The working directory of its `pip install`, with what it copies there."""
    directory.mkdir()
    for name, rest in instructions():
        if name == "COPY":
            *sources, target = rest.split()
            for source in sources:
                place = directory / target / (Path(source).name if target.endswith("/") else "")
                if (ROOT / source).is_dir():
                    shutil.copytree(ROOT / source, directory / target, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
                else:
                    shutil.copy(ROOT / source, place)
    return directory


def resolved(directory: Path, *words: str) -> list[dict]:
    """What pip would install into a fresh environment, with nothing of this machine's settings but its index."""
    fresh, report = directory.parent / "fresh", directory.parent / "report.json"
    venv.EnvBuilder(with_pip=True).create(fresh)
    environ = os.environ | {"PIP_CONFIG_FILE": os.devnull, "PIP_CONSTRAINT": "", "PIP_EXTRA_INDEX_URL": "", "PIP_FIND_LINKS": ""}
    line = [str(fresh / "bin/python"), "-m", "pip", "install", "--dry-run", "--report", str(report), "--quiet", *words]
    done = subprocess.run(line, cwd=directory, env=environ, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stderr[-4000:]
    return [each["metadata"] for each in json.loads(report.read_text())["install"]]


@pytest.mark.acceptance
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("words", [["-e", ".[gpu]"], [*asked()[0], *asked()[1]]], ids=["by hand", "image"])
def test_pip_resolves_what_is_asked_for_on_gpus(words, tmp_path):
    """Asks pip's index; nothing is installed. Transformer Engine's half for torch is compiled before its requirements are known,
    so that alone is left out here."""
    found = resolved(copied(tmp_path / "image"), *words)
    versions = {each["name"].lower().replace("_", "-"): each["version"] for each in found}
    exact = {name: versions[name].partition("+")[0] for name in ("torch", "megatron-core", "vllm")}
    assert exact == {"torch": "2.13.0", "megatron-core": "0.16.1", "vllm": "0.32.0"}
    assert "nvidia-nccl-cu13" in versions and not any("transformer-engine" in name for name in versions)
    requires = {each["name"].lower().replace("_", "-"): each.get("requires_dist", []) for each in found}
    environment = Environment(versions, requires, "13.0")
    assert wrong(environment, "training", "servers") == [] and untried(environment, "training", "servers") == []
    print({name: versions[name] for name in (*TOGETHER, "nvidia-nccl-cu13", "tokenizers", "numpy") if name in versions})


@pytest.mark.acceptance
def test_what_it_imports_can_be_imported():
    code = "import " + ", ".join(sorted(imports()))
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd="/", capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-4000:]
