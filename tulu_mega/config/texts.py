"""Settings as text: TOML that is read back, and the lines of `--help`."""

from __future__ import annotations

import json
import re
import textwrap
from typing import Any

from tulu_mega.config.source import describe


def as_toml(values: dict[str, Any], section: str = "") -> str:
    """Settings as TOML that `tulu-mega` reads back; unset ones as comments."""
    lines, tables = [], []
    for name, value in values.items():
        if isinstance(value, dict):
            dotted = f"{section}{_key(name)}"
            body = as_toml(value, f"{dotted}.")
            tables.append(f"\n[{dotted}]\n{body}".rstrip())
        elif value is None:
            lines.append(f"# {name} is not set")
        else:
            lines.append(f"{_key(name)} = {_toml(value)}")
    return "\n".join([*lines, *tables])


def _toml(value: Any) -> str:
    """JSON's numbers, booleans, strings and lists are TOML's, but for DEL, which TOML wants escaped."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _key(name: str) -> str:
    return name if re.fullmatch(r"[\w-]+", name, re.ASCII) else _toml(name)


def help_text(program: str, operands: str, summary: str, settings: type) -> str:
    """A program's usage, what it does, and its settings by section."""
    sections: dict[str, list[tuple[str, str, str, str]]] = {}
    for row in describe(settings):
        section = row[0].rpartition(".")[0]
        sections.setdefault(section, []).append(row)
    lines = [f"usage: {program} {operands} [--section.key value ...]", "", summary]
    for section in sorted(sections, key=bool):  # settings without a section first
        lines += ["", f"[{section}]" if section else "Settings"]
        for dotted, kind, default, text in sections[section]:
            shown = default if default.startswith("required") else "not set" if default == "None" else f"default {default}"
            lines.append(f"  --{dotted}  {kind}, {shown}")
            lines += textwrap.wrap(text.replace("`", ""), width=110, initial_indent="      ", subsequent_indent="      ")
    return "\n".join(lines)
