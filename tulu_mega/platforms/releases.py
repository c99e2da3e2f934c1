"""A check that the installed releases go together: what is known not to work is refused, what nobody has tried gets a warning."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from packaging.requirements import InvalidRequirement, Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

from tulu_mega.errors import UserError
from tulu_mega.outside.versions import INSTALL_ENGINE, PACKAGES, TOGETHER

Part = Literal["training", "servers"]
PARTS: dict[Part, tuple[str, ...]] = {
    "training": ("torch", "megatron-core", "transformer-engine", "transformers"),
    "servers": ("torch", "vllm", "transformers"),
}
"""What ranks and vLLM's processes import."""

_ENGINE = ("transformer-engine", "transformer-engine-torch", "transformer-engine-cu12", "transformer-engine-cu13")
"""Distributions of Transformer Engine: the one that depends on the others, the half for torch, the library for each CUDA."""
_AT_IMPORT = ("huggingface-hub", "numpy", "regex", "safetensors", "tokenizers")
"""Requirements that transformers checks when it is imported; it raises where one is not met."""


@dataclass(frozen=True)
class Known:
    """Releases of a package that are known not to work."""

    package: str
    releases: str
    why: str


BROKEN = (
    Known("megatron-core", "<0.15", "it has no `process_groups_config.ProcessGroupCollection`"),
    Known("megatron-core", ">=0.17", "it has no `dist_checkpointing.strategies.common.TorchCommonSaveStrategy` any more"),
)
"""Read in the sources of megatron-core 0.14 to 0.19."""


@dataclass(frozen=True)
class Environment:
    """The packages of one Python that are checked."""

    versions: Mapping[str, str]
    """version of each installed distribution"""
    requirements: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """requirements of each distribution, from its metadata"""
    cuda: str | None = None
    """CUDA version that torch was built with; None for a CPU build"""

    def version(self, package: str) -> tuple[str, str] | None:
        """The distribution that a package is installed as, and its version; None where it is not.

        Args:
            package: one of `tulu_mega.outside.versions.PACKAGES`, or a distribution.
        """
        found = (name for name in PACKAGES.get(package, (package,)) if name in self.versions)
        return next(((name, self.versions[name]) for name in found), None)


def this_environment() -> Environment:
    """Describe this Python's packages. Only torch is imported for it."""
    import torch

    versions, requirements = {}, {}
    for name in dict.fromkeys([*(name for names in PACKAGES.values() for name in names), *_ENGINE, *_AT_IMPORT]):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
            requirements[name] = tuple(importlib.metadata.requires(name) or ())
    return Environment(versions, requirements, torch.version.cuda)


def wrong(environment: Environment, *parts: Part) -> list[str]:
    """Return a line for each installed package that is known not to work, and last which releases go together; an empty list
    where all may work.

    Args:
        parts: the parts that will run.
    """
    return _told(environment, parts, (_broken, _unmet, _engine_in_pieces))


def untried(environment: Environment, *parts: Part) -> list[str]:
    """Return a line for each installed package that may work but has not been tried with this program."""
    return _told(environment, parts, (_outside,))


def refuse(*parts: Part) -> None:
    """Looks at this Python's packages; they are read once a process.

    Raises:
        UserError: with what `wrong` finds.
    """
    if problems := wrong(_here(), *parts):
        raise UserError(problems)


def untried_here(*parts: Part) -> list[str]:
    """`untried` of this Python's packages."""
    return untried(_here(), *parts)


_here = functools.cache(this_environment)


def together() -> str:
    """Which releases go together, in words."""
    return "these go together: " + ", ".join(f"{name} {asked.lstrip('=')}" for name, asked in TOGETHER.items())


Look = Callable[[Environment, Sequence[str]], Iterator[str]]


def _told(environment: Environment, parts: Sequence[Part], looks: Sequence[Look]) -> list[str]:
    packages = list(dict.fromkeys(package for part in parts for package in PARTS[part]))
    lines = [line for look in looks for line in look(environment, packages)]
    return [*dict.fromkeys(lines), together()] if lines else []


def _broken(environment: Environment, packages: Sequence[str]) -> Iterator[str]:
    """Releases of `BROKEN`."""
    for known in BROKEN:
        found = environment.version(known.package) if known.package in packages else None
        if found and _within(found[1], known.releases):
            expected = TOGETHER[known.package]
            yield f"{found[0]} {found[1]} does not work here: {known.why}; expected {expected}: {_install(known.package)}"


def _unmet(environment: Environment, packages: Sequence[str]) -> Iterator[str]:
    """Yield the requirements of packages that other packages do not meet, by their metadata, and those of transformers at
    import."""
    for package in packages:
        if (asking := environment.version(package)) is None:
            continue
        for line in environment.requirements.get(asking[0], ()):
            with contextlib.suppress(InvalidRequirement):
                asked = Requirement(line)
                name = asked.name.lower().replace("_", "-")
                if name not in packages and not (package == "transformers" and name in _AT_IMPORT):
                    continue
                if asked.marker is not None and not asked.marker.evaluate({"extra": ""}):
                    continue
                found = environment.version(name)
                if found and not _within(found[1], _public(str(asked.specifier))):
                    yield (
                        f"{asking[0]} {asking[1]} asks for {name} {_public(str(asked.specifier))}, found {found[1]}; "
                        f"pip install '{name}{TOGETHER.get(name, _public(str(asked.specifier)))}', or another {package}"
                    )


def _engine_in_pieces(environment: Environment, packages: Sequence[str]) -> Iterator[str]:
    """What Transformer Engine refuses when it is imported, which megatron-core does wherever it is installed."""
    pieces = {name: environment.versions[name] for name in _ENGINE if name in environment.versions}
    if "transformer-engine" not in packages or not pieces:
        return
    libraries = [name for name in pieces if name.startswith("transformer-engine-cu")]
    if len(set(pieces.values())) > 1:
        found = ", ".join(f"{name} {version}" for name, version in pieces.items())
        yield f"Transformer Engine's packages are of several releases: {found}; expected one of all: {INSTALL_ENGINE}"
    if len(libraries) > 1:
        yield f"{' and '.join(libraries)} are installed, which have the same files; uninstall both, then: {INSTALL_ENGINE}"
    elif libraries and "transformer-engine-torch" not in pieces:
        yield f"Transformer Engine's half for torch is missing beside {libraries[0]}: {INSTALL_ENGINE}"
    if environment.cuda and libraries:
        major = environment.cuda.partition(".")[0]
        if all(name != f"transformer-engine-cu{major}" for name in libraries):
            yield (
                f"{libraries[0]} is for another CUDA than torch, which was built with {environment.cuda}; uninstall it and "
                f"install transformer-engine-cu{major}, or take a torch for that CUDA"
            )


def _outside(environment: Environment, packages: Sequence[str]) -> Iterator[str]:
    """Yield releases that are neither in `TOGETHER` nor known to be broken."""
    for package in packages:
        found = environment.version(package)
        if found and not _within(found[1], TOGETHER[package]):
            broken = any(known.package == package and _within(found[1], known.releases) for known in BROKEN)
            if not broken:
                yield (
                    f"{found[0]} {found[1]} was not tried with this program; expected {TOGETHER[package]}: should anything "
                    f"fail, {_install(package)}"
                )


def _install(package: str) -> str:
    return INSTALL_ENGINE if package == "transformer-engine" else f"pip install '{package}{TOGETHER[package]}'"


def _within(version: str, releases: str) -> bool:
    """Whether a version is of these releases, whatever it was built with (``2.13.0+cpu`` is 2.13.0) and as of its date: a build
    on the way to a release is none of it."""
    try:
        return Version(version).public in SpecifierSet(releases, prereleases=True)
    except InvalidVersion:
        return False


def _public(specifier: str) -> str:
    """A specifier without the builds it names: ``==2.13.0+cpu`` is met by any build of 2.13.0."""
    return ",".join(sorted(part.partition("+")[0] for part in specifier.split(","))) if specifier else ""
