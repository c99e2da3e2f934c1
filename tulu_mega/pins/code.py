"""Verifiers as pins: the source files that they are made of."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import sys
import sysconfig
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import tulu_mega
from tulu_mega.errors import UserError
from tulu_mega.outside.versions import of_package
from tulu_mega.pins.digest import digest
from tulu_mega.pins.record import Part, Pin
from tulu_mega.rewards import verifiers

_OWN = Path(tulu_mega.__file__).parent
_INSTALLED = tuple(Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib", "platlib"))


def custom(given: Mapping[str, str]) -> Pin:
    """The pin of verifiers of one's own: the module of each, and what it imports of its own package or that is not installed.

    Args:
        given: name = ``module:function``, found importable before.

    Raises:
        UserError: a source file cannot be read by itself, as in a zip archive.
    """
    parts = {}
    for name, path in given.items():
        module, _, attribute = path.partition(":")
        own = _package_directories(module)
        for found, file in _sources(module, lambda file, own=own: _mine(file) or any(each in file.parents for each in own)):
            key = f"{name}:{attribute}" if found == module else f"{name}:{found}"
            try:
                parts[key] = Part(f"{file} (verifier {name!r}, {attribute})", digest(file))
            except OSError as error:
                raise UserError(
                    f"rewards.custom: verifier {name!r} is made of {file}, which cannot be read: {error}; a verifier's code is "
                    "compared at each start, so give it as plain files"
                ) from None
    return Pin(", ".join(f"{name} = {path!r}" for name, path in given.items()), parts)


def built_in(names: Sequence[str]) -> Pin:
    """The pin of verifiers of this program."""
    package = _OWN / "rewards"
    roots = [f"{verifiers.__name__}.{name}" for name in names]
    found = {file for root in roots for _, file in _sources(root, lambda file: package in file.parents)}
    if "python_code" in names:
        found.update((package / "sandboxed").glob("*.py"))  # no imports of it: they run as a program
    parts = {str(file.relative_to(_OWN)): Part(f"tulu_mega/{file.relative_to(_OWN)}", digest(file)) for file in sorted(found)}
    imported = {each.partition(".")[0] for file in found for each in _imported(file, "")}
    for name in sorted(imported - {*sys.stdlib_module_names, _OWN.name, ""}):
        if version := of_package(name):
            parts[f"package {name}"] = Part(f"the package {name} {version}", hashlib.sha256(version.encode()).hexdigest())
    return Pin(", ".join(names), parts)


def adopt(before: Pin | None, now: Pin) -> None:
    """Takes parts of verifiers that are pinned already, and that nobody looked at before, into their pin. A verifier that imports
    more than it did has changed itself, which its own part tells.
    """
    known = {name.partition(":")[0] for name in before.parts} if before else ()
    for name, part in now.parts.items():
        if name.partition(":")[0] in known:
            before.parts.setdefault(name, part)


def _package_directories(module: str) -> tuple[Path, ...]:
    """Where the package around a module lies; none of a module that is in no package."""
    top, dot, _ = module.partition(".")
    spec = importlib.util.find_spec(top) if dot else None
    return tuple(map(Path, spec.submodule_search_locations or ())) if spec else ()


def _mine(file: Path) -> bool:
    return not any(root in file.parents for root in (*_INSTALLED, _OWN))


def _sources(module: str, counts: Callable[[Path], bool]) -> Iterator[tuple[str, Path]]:
    """Name and source file of a module, then of those that it imports, however far away, where they count."""
    waiting, seen, aside = [module], set(), set()
    while waiting:
        name = waiting.pop(0)
        if name in seen:
            continue
        seen.add(name)
        packages = _packages(name)
        if name != module and any(each in aside and each not in sys.modules for each in packages):
            continue  # to find a module its package is imported: not those that do not count
        try:
            spec = importlib.util.find_spec(name)
        except Exception:  # whatever a package of one's own comes to when it is imported
            aside.add(name)
            continue
        if spec is None:
            continue
        origin = Path(spec.origin) if spec.has_location and spec.origin else None
        if origin is None or not (name == module or counts(origin)):
            if origin or not spec.submodule_search_locations:  # else a package without a file of its own
                aside.add(name)
            continue
        yield name, origin
        if not spec.submodule_search_locations:
            aside.add(name)  # no package: what is imported from it is no module, and to look would run it
        if name == module:
            waiting += packages
        if origin.suffix == ".py":
            package = name if spec.submodule_search_locations else name.rpartition(".")[0]
            waiting += [each for found in _imported(origin, package) for each in (*_packages(found), found)]


def _packages(name: str) -> list[str]:
    """The packages around a module, the outermost first."""
    parts = name.split(".")
    return [".".join(parts[:at]) for at in range(1, len(parts))]


def _imported(file: Path, package: str) -> list[str]:
    """Names that may be modules which a file imports."""
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError):
        return []
    found = []
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                found += [each.name for each in names]
            case ast.ImportFrom(module=base, names=names, level=level):
                parents = package.split(".")
                above = parents[: len(parents) - level + 1] if level else []
                whole = ".".join([*above, *([base] if base else [])])
                found += [whole, *(f"{whole}.{each.name}" for each in names)]
    return found
