"""`tulu-mega plan`: reads a stage's file, says what it will take."""

from __future__ import annotations

import json
from dataclasses import replace

from tulu_mega.bridge.adapters import adapted
from tulu_mega.bridge.families import family_for
from tulu_mega.config.stages import STAGES
from tulu_mega.errors import UserError
from tulu_mega.layout.hardware import gpu_named
from tulu_mega.plan.explained import explained, explanation
from tulu_mega.plan.outlook import Outlook, divisions, outlook
from tulu_mega.plan.picture import draw
from tulu_mega.plan.question import Question
from tulu_mega.plan.search import search
from tulu_mega.plan.settings import PlanSettings
from tulu_mega.plan.source import read_architecture, read_architecture_beside, read_stage
from tulu_mega.plan.table import as_json, as_ranking, as_tables


def run(settings: PlanSettings) -> None:
    """Prints the plan and draws it where asked; then tells what would not run, as errors.

    Raises:
        UserError: with everything that is wrong with the file, or for which the run does not fit.
    """
    question = ask(settings)
    if settings.dry_run:
        if wrong := divisions(question):
            raise UserError(wrong)
        from tulu_mega.plan.dry_run.run import dry_run  # brings torch along
        from tulu_mega.plan.dry_run.show import tell

        tell(dry_run(question.settings, question.config, question.trainers, question.value_config), settings.format)
        return
    results = search(question) if settings.search else [outlook(question)]
    _print(settings, results)
    if settings.picture:
        draw(results[0], settings.picture)
    if results[0].problems:
        raise UserError(results[0].problems)


def ask(settings: PlanSettings) -> Question:
    """What is asked about. Raises UserError for what is wrong with the file, the model or the GPU."""
    stage, said = read_stage(settings)
    gpu = gpu_named(settings.gpu)
    rollout_gpu = gpu_named(settings.rollout_gpu, "rollout_gpu") if settings.rollout_gpu else None
    config = read_architecture(said.model, reward=STAGES[stage].reward)
    question = Question(
        stage,
        said,
        config,
        gpu,
        settings.gpus,
        settings.rows,
        settings.mean_length,
        settings.response_length,
        rollout_gpu,
        settings.storage * 1e9,
    )
    if said.lora and not said.lora.adapter and (wrong := said.lora.unmatched(adapted(family_for(config), config))):
        raise UserError([f"lora.{each}" for each in wrong])
    value, rewards = question.workload.value, question.workload.rewards
    beside = {}
    if value:
        beside["value_config"] = read_architecture_beside(said.model, "value.path", value.path)
    if rewards:
        beside["rewards_config"] = read_architecture_beside(said.model, "rewards.model", rewards)
    return replace(question, **beside)


def _print(settings: PlanSettings, results: list[Outlook]) -> None:
    if settings.format == "json":
        made = [{**as_json(each), **(explained(each) if settings.explain else {})} for each in results[: settings.top]]
        print(json.dumps(made if settings.search else made[0], indent=2, allow_nan=False))
        return
    from rich.console import Console
    from rich.table import Table

    from tulu_mega.data.tools.tables import print_table

    console = Console(soft_wrap=False)
    shown = [as_ranking(results, settings.top)] if settings.search else as_tables(results[0])
    for each in [*shown, *(explanation(results[0]) if settings.explain else [])]:
        if isinstance(each, Table):  # at the width that it takes: numbers are not to be cut where a terminal is narrow
            print_table(each, console)
        else:
            console.print(each, soft_wrap=not console.is_terminal)
