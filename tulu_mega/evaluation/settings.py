"""What `tulu-mega eval` takes."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field, field_validator, model_validator

from tulu_mega.config.sections import AskedTemplate, ModelSettings, PositiveInt, Section
from tulu_mega.errors import nearest
from tulu_mega.evaluation.tasks import TASKS


class TaskSettings(Section):
    """One task; what is not set is the task's preset."""

    alone: ClassVar[str] = "data"
    data: str | list[str] | None = None
    """JSONL, JSON or Parquet file(s) in the task's public format, or a hub name; the public set on the hub when unset."""
    split: str | None = None
    """Split of a hub data set."""
    shots: Annotated[int, Field(ge=0)] | None = None
    """Worked examples before each question."""
    shots_from: str | None = None
    """File or hub name of the rows they are taken from. `lm_eval:gsm8k_cot` or `lm_eval:bbh_cot_fewshot`: the published prompts
    in lm-evaluation-harness' words, of its installed package (or a YAML file of its). Neutral ones of our own when unset."""
    shots_split: str = "train"
    """Split of a hub data set of worked examples."""
    max_tokens: PositiveInt | None = None
    """Longest response."""
    limit: PositiveInt | None = None
    """Ask so many problems at most: as many of each subject, sub-task or other group as of the others, drawn by a fixed seed, so
    that every model is asked the same ones."""


class EvalSettings(Section):
    """`tulu-mega eval`: a checkpoint on benchmarks."""

    model: ModelSettings
    adapter: str | None = None
    """Directory of low-rank adapters in PEFT's format: vLLM holds them beside the model's weights, or they are merged where it
    cannot."""
    output: str
    """Directory of the results: results.json and samples/TASK.jsonl. What was answered there is not asked again."""
    tasks: dict[str, TaskSettings]
    """Table of tasks by name (gsm8k, math, ifeval, mmlu, bbh, humaneval, mbpp, rlvr), each with settings of its own or its file
    alone: `--tasks.gsm8k test.jsonl`."""
    template: AskedTemplate = "auto"
    system: str | None = None
    """System message put before every conversation that has none."""
    samples: PositiveInt = 1
    """Responses to each problem."""
    temperature: Annotated[float, Field(ge=0)] = 0.0
    """0 takes the most probable token each time."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    pass_at: list[PositiveInt] = []
    """Also give pass@k for these k, each at most `samples`."""
    seed: int = 0
    tensor: PositiveInt = 1
    """vLLM's tensor parallel size."""
    max_model_len: PositiveInt | None = None
    """Longest prompt and response together; the model's own limit when unset."""
    python: str | None = None
    """Python that starts vLLM: of another environment with vLLM and this version of tulu_mega. The one that runs this command
    when unset."""
    verifiers: dict[str, str] = {}
    """Verifiers of your own for rlvr rows: name in their `dataset` column = `module:function`."""
    save_every: PositiveInt = 512
    """Problems given to vLLM together. Each answer is kept as it comes, whatever this is."""

    @field_validator("tasks")
    @classmethod
    def _known_tasks(cls, tasks: dict[str, TaskSettings]) -> dict[str, TaskSettings]:
        if not tasks:
            raise ValueError(f"no task; give at least one of {', '.join(TASKS)}, such as --tasks.gsm8k test.jsonl")
        for name, task in tasks.items():
            if name not in TASKS:
                raise ValueError(f"unknown task {name!r}{nearest(name, TASKS)}; known: {', '.join(TASKS)}")
            if task.data is None and not TASKS[name].hub:
                raise ValueError(f"{name}: no data given, and it has no public set on the hub; set tasks.{name}.data")
        return tasks

    @model_validator(mode="after")
    def _enough_samples(self) -> EvalSettings:
        if self.pass_at and max(self.pass_at) > self.samples:
            raise ValueError(
                f"pass_at asks for {max(self.pass_at)} responses to a problem, samples = {self.samples}; raise samples"
            )
        if self.samples > 1 and self.temperature == 0:
            raise ValueError(f"samples = {self.samples} at temperature 0 are all the same; set temperature, such as 0.8")
        return self
