"""TOML file and `--section.key value` flags to one settings object, with every problem told at once."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, TypeAdapter, ValidationError

from tulu_mega.config.effects import section_of
from tulu_mega.config.sections import Alone, Section
from tulu_mega.errors import UserError, nearest

S = TypeVar("S", bound=Section)


def load(settings: type[S], file: str | None, flags: Sequence[str] = ()) -> S:
    """Reads a TOML file, lays the flags over it, validates.

    Args:
        settings: the command's settings class.
        file: path of a TOML file, or None when flags say everything.
        flags: ``["--optim.lr", "1e-5", "--data.shuffle=false", ...]``.

    Raises:
        UserError: with all problems of file and flags together.
    """
    values = _read_toml(file) if file is not None else {}
    problems = [
        f"{file}: {name}: only on the command line, as --{name}, where it is seen each time; take it out of the file"
        for name in settings.flags_alone
        if name in values
    ]
    for dotted, text in _pairs(settings, flags, problems):
        _put(settings, values, dotted, _parse(settings, dotted, text), problems)
    try:
        result = settings.model_validate(values)
    except ValidationError as error:
        problems += [_explain(settings, dict(item)) for item in error.errors()]
    if problems:
        raise UserError(problems)
    return result


def describe(settings: type[BaseModel], prefix: str = "") -> list[tuple[str, str, str, str]]:
    """Rows of (dotted name, type, default, help) of every setting, for `--help`."""
    rows = []
    for name, field in settings.model_fields.items():
        section = section_of(field.annotation)
        if section:
            inner = describe(section, f"{prefix}{name}.")
            if not field.is_required() and field.default is None:  # the section may be left out, and then all that is in it
                needed = f"required where [{prefix}{name}] is given"
                inner = [(*row[:2], needed if row[2] == "required" else row[2], row[3]) for row in inner]
            rows += inner
            continue
        if get_origin(field.annotation) is dict and (section := section_of(get_args(field.annotation)[1])):
            rows += describe(section, f"{prefix}{name}.NAME.")
        default = "required" if field.is_required() else str(field.default)
        rows.append((f"{prefix}{name}", _kind(field.annotation), default, (field.description or "").replace("\n", " ")))
    return rows


def _kind(annotation: Any) -> str:
    """A type as users write its values: constraints and None left out."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _kind(arguments[0])
    if origin is Literal:
        return " | ".join(str(value) for value in arguments)
    if origin in (Union, UnionType):
        return " or ".join(_kind(part) for part in arguments if part is not type(None))
    if origin in (list, tuple):
        return f"list of {_kind(arguments[0])}"
    if origin is dict:
        return "table"
    return {str: "text"}.get(annotation, annotation.__name__)


def parse_toml(text: str) -> dict[str, Any]:
    """What TOML says.

    Raises:
        ValueError: it is no TOML, is nested more deeply than Python's parser goes, or has a number of thousands of digits.
    """
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise ValueError("brackets are nested too deeply") from None


def _read_toml(file: str) -> dict[str, Any]:
    path = Path(file)
    try:
        return parse_toml(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{file}: no such file; give the path of a TOML file with the settings") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: cannot be read as text: {error}") from None
    except ValueError as error:
        raise UserError(f"{file}: not valid TOML: {error}") from None


def _pairs(settings: type[BaseModel], flags: Sequence[str], problems: list[str]) -> list[tuple[str, str]]:
    pairs, rest = [], list(flags)
    while rest:
        flag = rest.pop(0)
        if not flag.startswith("--"):
            problems.append(f"{flag}: expected --section.key value; a settings file comes before all flags")
            continue
        name, equals, value = flag[2:].partition("=")
        if not equals:
            if not rest or rest[0].startswith("--"):
                field = _field(settings, name.replace("-", "_"))
                if field is not None and field.annotation is bool:
                    pairs.append((name.replace("-", "_"), "true"))
                    continue
                problems.append(f"--{name}: no value given; write --{name} VALUE")
                continue
            value = rest.pop(0)
        pairs.append((name.replace("-", "_"), value))
    return pairs


def _field(settings: type[BaseModel], dotted: str):
    section: type[BaseModel] | None = settings
    field = None
    for part in dotted.split("."):
        field = section.model_fields.get(part) if section else None
        section = section_of(field.annotation) if field else None
    return field


def _section_at(settings: type[BaseModel], parts: Sequence[str]) -> type[BaseModel] | None:
    """The section at a dotted place; the values of a table of sections are such places too."""
    place: Any = settings
    for part in parts:
        if section := section_of(place):
            place = field.annotation if (field := section.model_fields.get(part)) else None
        else:
            place = get_args(place)[1] if get_origin(place) is dict else None
    return section_of(place)


def _parse(settings: type[BaseModel], dotted: str, text: str) -> Any:
    """A flag's text as the value TOML would give it, or as plain text where the setting takes text."""
    try:
        value = parse_toml(f"value = {text}")["value"]
    except ValueError:
        return text
    field = _field(settings, dotted)
    if field is None or isinstance(value, str | list | dict):
        return value
    # "--run_dir 123": a number to TOML, yet a fine directory name
    adapter = TypeAdapter(field.annotation)
    for candidate in (value, text):
        try:
            adapter.validate_python(candidate)
            return candidate
        except ValidationError:
            continue
    return value


def _put(settings: type[BaseModel], values: dict[str, Any], dotted: str, value: Any, problems: list[str]) -> None:
    *parents, last = parts = dotted.split(".")
    for depth, parent in enumerate(parents, 1):
        inner = values.setdefault(parent, {})
        if not isinstance(inner, dict) and (alone := _alone(settings, parts[:depth])):
            inner = values[parent] = {alone: inner}  # `model = "dir"` in the file, --model.dtype beside it
        if not isinstance(inner, dict):
            problems.append(f"--{dotted}: {parent!r} is not a section but a setting")
            return
        values = inner
    if isinstance(values.get(last), dict) and not isinstance(value, dict) and (alone := _alone(settings, parts)):
        values[last][alone] = value
    else:
        values[last] = value


def _alone(settings: type[BaseModel], parts: Sequence[str]) -> str:
    """The setting that a section is meant by when it is given as a value, empty when there is none."""
    if section := _section_at(settings, parts):
        return getattr(section, "alone", "")
    field = _field(settings, ".".join(parts))
    return next((each.setting for each in (field.metadata if field else ()) if isinstance(each, Alone)), "")


def _explain(settings: type[BaseModel], error: dict[str, Any]) -> str:
    where = ".".join(str(part) for part in error["loc"])
    match error["type"]:
        case "extra_forbidden":
            section = _section_at(settings, [str(part) for part in error["loc"][:-1]])
            names = list((section or settings).model_fields)
            same = [row[0] for row in describe(settings) if row[0].split(".")[-1] == error["loc"][-1]]
            hint = f"; did you mean {same[0]!r}?" if same else nearest(str(error["loc"][-1]), names)
            hint = hint or f"; known here: {', '.join(names)}"
            return f"{where}: unknown setting{hint}"
        case "missing":
            return f"{where}: required, but not given; set it in the file or with --{where}"
        case "value_error":
            told = str(error["ctx"]["error"])
            return f"{where}: {told}" if where else told  # of the command's settings as a whole
        case _:
            return f"{where}: {error['msg'].lower()}, got {_shown(error['input'])} ({type(error['input']).__name__})"


def _shown(value: Any) -> str:
    """A value as Python writes it, no longer than a message should be."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # a number of thousands of digits
        return "one that is too long to be shown"
    return text if len(text) <= 500 else f"{text[:500]}..."
