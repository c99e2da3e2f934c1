"""Generated parts of the documents: commands, settings, metrics, exit statuses, public names. `generated_docs.py` places them."""

from __future__ import annotations

from collections.abc import Iterable

from public_surface import definition  # beside this file

import tulu_mega
from tulu_mega.cli import CHECK, CHECK_SUMMARY, COMMANDS
from tulu_mega.config import describe
from tulu_mega.config.stages import STAGES
from tulu_mega.errors import STATUSES
from tulu_mega.launch.launcher import resolve
from tulu_mega.report.metric_names import ALL, METRICS

_TOP = "no section"


def _cell(text: str) -> str:
    """Text for a cell of a Markdown table."""
    return text.replace("|", "\\|").replace("\n", " ")


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    names = list(head)
    lines = [names, ["---"] * len(names), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def command_table() -> str:
    """The commands, a line each."""
    rows = {name: command.summary for name, command in COMMANDS.items()} | {CHECK: CHECK_SUMMARY}
    return _table(("command", "does"), ((f"`{name}`", _cell(summary)) for name, summary in rows.items()))


def commands() -> str:
    """A section for each command: its usage, an example, and the sections of its settings."""
    parts = []
    for name, command in COMMANDS.items():
        usage = f"[{command.operands.upper()} ...]" if command.operands else "[config.toml]"
        sections = dict.fromkeys(row[0].rpartition(".")[0] for row in describe(resolve(command.settings)))
        told = ", ".join(f"[`{each}`](settings.md#{_anchor(each)})" for each in sorted(sections) if each)
        own = [f"[settings without a section](settings.md#{_anchor('')})"] if "" in sections else []
        ranks = "It starts its ranks, or joins those of torchrun." if command.world else "It is one process."
        parts += [
            f"### {name}\n",
            f"{command.summary[:1].upper()}{command.summary[1:]}. {ranks}\n",
            f"```sh\ntulu-mega {name} {usage} [--section.key value ...]\n{command.example}\n```\n",
            f"Settings: {', '.join([*own, told]) if told else own[0]}.\n",
        ]
    return "\n".join(parts).rstrip()


def _anchor(section: str) -> str:
    """GitHub's anchor of a section's heading."""
    return "".join(each for each in (section or _TOP).lower().replace(" ", "-") if each.isalnum() or each in "-_")


def settings() -> str:
    """A table for each section: its settings, the commands that take them, type, default and meaning."""
    takers: dict[tuple[str, str, str, str], list[str]] = {}
    for name, command in COMMANDS.items():
        for row in describe(resolve(command.settings)):
            takers.setdefault(row, []).append(name)
    sections: dict[str, list[str]] = {}
    for (dotted, kind, default, text), names in takers.items():
        shown = "not set" if default == "None" else default if default.startswith("required") else f"`{_cell(default)}`"
        cells = (f"`{dotted}`", _taken_by(names), _cell(kind), shown, _cell(text))
        sections.setdefault(dotted.rpartition(".")[0], []).append(f"| {' | '.join(cells)} |")
    head = "| setting | of | type | default | meaning |\n| --- | --- | --- | --- | --- |"
    parts = (f"## {section or _TOP}\n\n{head}\n" + "\n".join(sections[section]) for section in sorted(sections))
    return "\n\n".join(parts)


def _taken_by(names: list[str]) -> str:
    others = [name for name in names if name not in STAGES]
    stages = ["all stages"] if len(names) - len(others) == len(STAGES) else [name for name in names if name in STAGES]
    return ", ".join([*stages, *others])


def metrics() -> str:
    """The metrics of a step, and which stages write them."""
    rows = ((f"`{name}`", "every stage" if each.stages == ALL else each.stages, each.text) for name, each in METRICS.items())
    return _table(("metric", "stages", "meaning"), rows)


def exit_statuses() -> str:
    """The exit statuses of the command line."""
    return _table(("status", "meaning"), ((str(number), _cell(text)) for number, text in STATUSES.items()))


def public_names() -> str:
    """What `tulu_mega` offers to programs: name, where it is defined, first line of its docstring."""
    rows = []
    for name, target in tulu_mega.PUBLIC.items():
        text = definition(target)[1].split("\n\n")[0] or f"The settings `[{name.removesuffix('Settings').lower()}]`."
        rows.append((f"`{name}`", f"`{target.partition(':')[0]}`", _cell(text)))
    return _table(("name", "defined in", "what it is"), rows)
