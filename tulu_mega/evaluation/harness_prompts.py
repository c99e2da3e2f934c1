"""Worked examples and wording of lm-evaluation-harness' tasks, read out of its YAML files: the published prompts by name.

GSM8K's are those of Wei et al. (arXiv 2201.11903), BIG-Bench Hard's those of Suzgun et al. They are not part of this project; the
harness need not run for them, nor be imported.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tulu_mega.errors import UserError, nearest
from tulu_mega.evaluation.task import Row, Shot

PREFIX = "lm_eval:"


@dataclass(frozen=True)
class Prompts:
    """A task's worked examples, and how questions are worded, by group ("" where there are none)."""

    shots: list[Shot]
    wording: Mapping[str, str]
    """templates of Jinja over a row's fields"""

    def question(self, row: Row, group: str) -> str | None:
        """A row's question as the harness words it; None where it words none of that group.

        Raises:
            ValueError: the row has not the fields that are named there.
        """
        template = self.wording.get(group, self.wording.get(""))
        return None if template is None else _rendered(template, row)


def named(source: str | None) -> bool:
    """Whether worked examples are the harness': `lm_eval:NAME`, or a YAML file of its."""
    return source is not None and (source.startswith(PREFIX) or Path(source).suffix in (".yaml", ".yml"))


def read(source: str, task: str, setting: str) -> Prompts:
    """The prompts of a task of the harness.

    Args:
        source: `lm_eval:NAME`, looked for in the installed package, or a YAML file.
        task: our name of the benchmark, which is its folder there.
        setting: where the source is named, for messages.

    Raises:
        UserError: the package or the task is not there, or its file holds no worked examples.
    """
    if source.startswith(PREFIX):
        found = _installed(source.removeprefix(PREFIX), task, setting)
    else:
        file = Path(source).expanduser()
        found = {file: _yaml(file, setting)}
    shots, wording = [], {}
    for file, config in found.items():
        samples = (config.get("fewshot_config") or {}).get("samples")
        template, opening = config.get("doc_to_text"), str(config.get("description") or "")
        if not isinstance(samples, list) or not isinstance(template, str):
            told = "has no worked examples of its own (fewshot_config.samples) and wording (doc_to_text)"
            raise UserError(f"{setting} = {source!r}: {file} {told}; name another task")
        group = str(config.get("dataset_name") or "") if len(found) > 1 or task == "bbh" else ""
        wording[group] = template.rstrip("\n")
        try:
            for sample in samples:
                shots.append(Shot(opening + _rendered(wording[group], sample), str(sample["target"]).strip(), group))
                opening = ""
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{setting} = {source!r}: {file}: a worked example cannot be read: {error}") from None
    return Prompts(shots, wording)


def _installed(name: str, task: str, setting: str) -> dict[Path, dict[str, Any]]:
    """Files of the task of a name, or of those that a group of that name consists of."""
    package = find_spec("lm_eval")
    if package is None:
        what = "the package lm_eval is not installed; pip install --no-deps lm_eval, or name its YAML file"
        raise UserError(f"{setting} = {PREFIX + name!r}: {what}")
    folders = [Path(place) / "tasks" / task for place in package.submodule_search_locations or ()]
    files = sorted(file for folder in folders for file in folder.rglob("*.yaml"))
    configs = {file: _yaml(file, setting) for file in files}
    names = {str(config.get("task")): file for file, config in configs.items() if isinstance(config.get("task"), str)}
    if name in names:
        return {names[name]: configs[names[name]]}
    parts = {file: configs[file] for known, file in names.items() if known.startswith(f"{name}_")}
    if not parts:
        known = f"{nearest(name, names)}; expected a task of {task}'s with worked examples of its own"
        raise UserError(f"{setting} = {PREFIX + name!r}: lm_eval has no such task of {task}{known}")
    return parts


def _yaml(file: Path, setting: str) -> dict[str, Any]:
    """A file's settings; functions that it names are left out."""
    import yaml

    class Loader(yaml.SafeLoader):
        """Takes the harness' own tags for nothing."""

    Loader.add_multi_constructor("!", lambda *_: None)
    try:
        found = yaml.load(file.read_text(encoding="utf-8"), Loader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        told = next(iter(str(error).splitlines()), "")
        raise UserError(f"{setting}: {file}: cannot be read as YAML: {told}; expected a task of lm-evaluation-harness") from None
    return found if isinstance(found, dict) else {}


def _rendered(template: str, row: Row) -> str:
    """
    Raises:
        ValueError: a field that the template names is not there.
    """
    from jinja2 import StrictUndefined, TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    try:
        return ImmutableSandboxedEnvironment(undefined=StrictUndefined).from_string(template).render(**row)
    except TemplateError as error:
        raise ValueError(str(error)) from None
