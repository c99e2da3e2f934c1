"""The training stages: one descriptor each, which is all that the command line, the launcher, `check` and `plan` know of a stage.

Descriptors name code as ``module:attribute``, so that nothing is imported before it is needed, pydantic included.
docs/how-to/add_a_stage.md adds one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A training stage. Its settings are a :class:`tulu_mega.config.run.RunSettings` with [data] and [train]."""

    name: str
    """Name of the command."""
    summary: str
    example: str
    settings: str
    """Class of the settings, ``module:class``."""
    recipe: str
    """``run(settings, world)``: trains. Every rank calls it."""
    problems: str
    """``problems(settings, findings)``: notes in a :class:`tulu_mega.preflight.findings.Findings` what is wrong."""
    workload: str
    """``workload(settings)``: the :class:`tulu_mega.config.workload.Workload` that `plan` plans"""
    companions: str = ""
    """``companions(settings, trainers)``: a context manager of servers around the ranks, or None"""
    restarts: str = ""
    """``restarts(settings)``: how often the launcher starts the ranks anew after one died. Empty: never."""
    reward: bool = False
    """Whether the stage trains a reward model."""
    sections: tuple[str, ...] = ()
    """Sections that no other stage has. A settings file with one of them is for this stage."""
    marks: tuple[str, ...] = ()
    """Dotted settings that tell the stage where no section does."""
    hints: tuple[str, ...] = ()
    """Dotted settings that tell the stage where neither section, mark nor file name does."""


STAGES = {
    stage.name: stage
    for stage in (
        Stage(
            name="sft",
            summary="supervised fine-tuning: a model and conversations in, a run directory out",
            example="tulu-mega sft examples/tulu3/8b/sft.toml --parallel.tensor 2",
            settings="tulu_mega.config.sft:SftSettings",
            recipe="tulu_mega.recipes.sft:run",
            problems="tulu_mega.preflight.dataset:problems",
            workload="tulu_mega.config.sft:workload",
            hints=("train.reduction",),
        ),
        Stage(
            name="rm",
            summary="a reward model from pairs: a model and chosen and rejected conversations in, a run directory out",
            example="tulu-mega rm examples/tulu3/8b/rm.toml --heldout.data pairs.jsonl",
            settings="tulu_mega.config.rm:RmSettings",
            recipe="tulu_mega.recipes.rm:run",
            problems="tulu_mega.preflight.dataset:reward_model_problems",
            workload="tulu_mega.config.rm:workload",
            reward=True,
            marks=("data.margin",),
        ),
        Stage(
            name="dpo",
            summary="preference tuning by DPO and its relatives: a model and pairs in, a run directory out",
            example="tulu-mega dpo examples/tulu3/8b/dpo.toml --preference.beta 5",
            settings="tulu_mega.config.dpo:DpoSettings",
            recipe="tulu_mega.recipes.dpo:run",
            problems="tulu_mega.preflight.dataset:problems",
            workload="tulu_mega.config.dpo:workload",
            sections=("preference", "reference"),
        ),
        Stage(
            name="grpo",
            summary="reinforcement learning with verifiable rewards: a model and prompts in, vLLM answers, a run directory out",
            example="tulu-mega grpo examples/tulu3/8b/grpo.toml --sampling.samples 8",
            settings="tulu_mega.config.grpo:GrpoSettings",
            recipe="tulu_mega.recipes.grpo:run",
            problems="tulu_mega.preflight.policy:problems",
            workload="tulu_mega.config.grpo:workload",
            companions="tulu_mega.inference.for_run:companions",
            restarts="tulu_mega.config.policy_run:restarts",
            sections=("sampling", "policy", "rollout", "rewards"),
        ),
        Stage(
            name="ppo",
            summary="reinforcement learning with a value model: a model, a reward model and prompts in, a run directory out",
            example="tulu-mega ppo examples/tulu3/8b/ppo.toml --value.path runs/rm/hf",
            settings="tulu_mega.config.ppo:PpoSettings",
            recipe="tulu_mega.recipes.ppo:run",
            problems="tulu_mega.preflight.ppo:problems",
            workload="tulu_mega.config.ppo:workload",
            companions="tulu_mega.inference.for_run:companions",
            restarts="tulu_mega.config.policy_run:restarts",
            sections=("value", "gae"),
        ),
    )
}
"""By name, in the order of the recipe."""
DEFAULT = "sft"
"""The stage that is meant where a command could be of several and nothing tells."""


def stage_of(settings: Any) -> Stage | None:
    """The stage that takes settings of this class; None where no stage does."""
    kind = type(settings)
    named = f"{kind.__module__}:{kind.__qualname__}"
    return next((stage for stage in STAGES.values() if stage.settings == named), None)
