"""`tulu-mega eval`: read the problems, ask those without an answer, judge all, say how good the model is.

In OUTPUT: ``results.json`` and ``samples/TASK.jsonl``, one object a problem with the prompt as a conversation (worked
examples included), the expected answer, and each response with what it earned.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tulu_mega import __version__
from tulu_mega.data.chat import prompt_ids, template_of
from tulu_mega.data.messages import NOTHING
from tulu_mega.data.stops import answer_text, stop_ids
from tulu_mega.data.tokenizer import load_tokenizer
from tulu_mega.errors import UserError
from tulu_mega.evaluation import rows
from tulu_mega.evaluation.judging import Judgement, check, judge
from tulu_mega.evaluation.samples import Record, SampleFile, key, model_identity
from tulu_mega.evaluation.settings import EvalSettings, TaskSettings
from tulu_mega.evaluation.statistics import Estimate, estimate, pass_at_k
from tulu_mega.evaluation.task import Messages, Problem, Shot, Task
from tulu_mega.evaluation.tasks import TASKS
from tulu_mega.inference import offline as vllm
from tulu_mega.inference.adapters import checked, served
from tulu_mega.inference.progress import progress

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

RESULTS = "results.json"
SAMPLES = "samples"


@dataclass(frozen=True)
class Asked:
    """A task ready to be asked: its problems, their prompts and the file of what was answered."""

    task: Task
    problems: list[Problem]
    messages: list[Messages]
    prompts: list[list[int]]
    keys: list[str]
    sampling: vllm.Sampling
    file: SampleFile
    shots: int
    shots_from: str

    @property
    def open(self) -> list[int]:
        """Indices of the problems without responses."""
        return [index for index, name in enumerate(self.keys) if name not in self.file]


def run(settings: EvalSettings) -> None:
    """Evaluates and prints a table.

    Raises:
        UserError: see :func:`evaluate`.
    """
    show(evaluate(settings))


def evaluate(settings: EvalSettings) -> dict[str, Any]:
    """Evaluates a checkpoint on all tasks in one start of vLLM; none at all when everything was answered before.

    Returns:
        what ``results.json`` holds: by task the metrics with value, interval and kind of interval, the scores by group, the
        settings in force, and how many responses were cut off or could not be judged.

    Raises:
        UserError: data of another format, no model there, prompts too long, vLLM missing or failing. All that can be found
            without vLLM is found before it starts, all tasks together.
    """
    began = time.monotonic()
    settings, tokenizer, asked = prepared(settings)
    if any(task.open for task in asked):
        for line in checked(settings.model.path, settings.adapter):
            print(line, file=sys.stderr, flush=True)
        with served(vllm.model_source(settings.model.path), settings.adapter) as model:
            server = vllm.Generator(
                model.model,
                vllm.DTYPES[settings.model.dtype],
                tensor=settings.tensor,
                max_model_len=settings.max_model_len,
                seed=settings.seed,
                trust_remote_code=settings.model.trust_remote_code,
                python=settings.python,
                adapter=model.adapter,
                adapter_rank=model.rank,
            )
            print(f"Starting vLLM on {settings.model.path} ...", file=sys.stderr, flush=True)
            with server as generator:
                for task in asked:
                    _ask(task, generator, tokenizer, settings.save_every)
    results = {
        "model": settings.model.path,
        "version": __version__,
        "settings": json.loads(settings.model_dump_json()),
        "tasks": {task.task.name: _judged(task, settings) for task in asked},
        "seconds": round(time.monotonic() - began, 1),
    }
    Path(settings.output).mkdir(parents=True, exist_ok=True)
    temporary = Path(settings.output) / f".{RESULTS}"
    temporary.write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    temporary.replace(Path(settings.output) / RESULTS)
    return results


def prepared(settings: EvalSettings) -> tuple[EvalSettings, PreTrainedTokenizerFast, list[Asked]]:
    """Everything that can be done without vLLM; nothing is written.

    Returns:
        the settings with the template that is taken, the tokenizer, and the tasks ready to be asked.

    Raises:
        UserError: as :func:`evaluate`.
    """
    model = vllm.model_source(settings.model.path)
    config = vllm.model_config(model, settings.model.trust_remote_code)
    checked(settings.model.path, settings.adapter)
    longest = vllm.longest_sequence(settings.model.path, config, settings.max_model_len)
    tokenizer = load_tokenizer(model, None, settings.template, settings.model.trust_remote_code, setting=None)
    settings = settings.model_copy(update={"template": template_of(tokenizer, settings.template)})
    asked, problems = [], []
    for name, task_settings in settings.tasks.items():
        try:
            asked.append(_prepare(TASKS[name], task_settings, settings, tokenizer, model, longest, config.vocab_size))
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError(problems)
    if any(task.open for task in asked):
        vllm.check_vllm(settings.python)
    return settings, tokenizer, asked


def show(results: dict[str, Any]) -> None:
    """Prints the results as a table."""
    from rich import box
    from rich.table import Table

    from tulu_mega.data.tools.tables import print_table

    table = Table(box=box.SIMPLE_HEAD, padding=0, pad_edge=False)  # whole in 80 columns
    for heading in ("task", "metric"):
        table.add_column(heading, no_wrap=True)
    for heading in ("score", "95% interval", "problems", "cut off"):
        table.add_column(heading, justify="right", no_wrap=True)
    for task in results["tasks"].values():
        for number, (name, metric) in enumerate(task["metrics"].items()):
            interval = f"{metric['low']:.1%} to {metric['high']:.1%}"
            title, *counts = (task["title"], str(task["problems"]), str(task["cut_off"])) if number == 0 else ("", "", "")
            table.add_row(title, name, f"{metric['value']:.1%}", interval, *counts)
    print_table(table)
    output = results["settings"]["output"]
    print(f"{output}/{RESULTS}: all of it; {output}/{SAMPLES}/: every response", file=sys.stderr)
    lost = sum(task["not_judged"] for task in results["tasks"].values())
    if lost:
        print(f"warning: {lost} responses could not be judged and are left out; see error in {output}/{SAMPLES}", file=sys.stderr)


def _prepare(
    task: Task,
    own: TaskSettings,
    settings: EvalSettings,
    tokenizer: PreTrainedTokenizerFast,
    model: str,
    longest: int | None,
    vocabulary: int,
) -> Asked:
    count = task.shots if own.shots is None else own.shots
    if count and task.shot is None:
        raise UserError(f"tasks.{task.name}.shots = {count}, but {task.title} takes no worked examples")
    problems, available = rows.problems_and_shots(task, own, bool(count or own.shots_from))
    check(task, problems, settings.verifiers)
    sampling = vllm.Sampling(
        max_tokens=own.max_tokens or task.max_tokens,
        temperature=settings.temperature,
        top_p=settings.top_p,
        samples=settings.samples,
        seed=settings.seed,
        stop_ids=stop_ids(tokenizer, settings.template, model),
        allowed_ids=_choices(task, tokenizer),
    )
    adapter = [model_identity(settings.adapter)] if settings.adapter else []
    decisive = [model_identity(model), *adapter, settings.model.dtype, asdict(sampling)]
    greedy = settings.temperature == 0
    messages, prompts, keys = [], [], []
    for problem in problems:
        try:
            conversation = _conversation(problem, rows.chosen(available, count, problem.group), settings.system)
            ids = prompt_ids(conversation, tokenizer, settings.template, problem.given or NOTHING)
            if problem.begin:
                ids = [*ids, *tokenizer(problem.begin, add_special_tokens=False)["input_ids"]]
            vllm.check_ids(ids, longest, vocabulary)
        except ValueError as error:
            hint = f" (tasks.{task.name}.shots = {count}: fewer make it shorter)" if count else ""
            raise UserError(f"{task.title}, problem {problem.row + 1}: {error}{hint}") from None
        messages.append(conversation)
        prompts.append(ids)
        keys.append(key(*decisive, ids, None if greedy else problem.row))  # a random stream goes with the problem's row
    file = SampleFile(Path(settings.output) / SAMPLES / f"{task.name}.jsonl")
    return Asked(task, problems, messages, prompts, keys, sampling, file, count, own.shots_from or "built-in")


def _choices(task: Task, tokenizer: PreTrainedTokenizerFast) -> tuple[int, ...]:
    ids = [tokenizer(choice, add_special_tokens=False)["input_ids"] for choice in task.choices]
    if any(len(tokens) != 1 for tokens in ids):
        raise UserError(f"{task.title}: the tokenizer has no single token for each of {', '.join(task.choices)}")
    return tuple(tokens[0] for tokens in ids)


def _conversation(problem: Problem, shots: Sequence[Shot], system: str | None) -> Messages:
    """System message, worked examples as turns, then the question."""
    start, messages = [], list(problem.messages)
    if messages[0]["role"] == "system":
        start, messages = messages[:1], messages[1:]
    elif system is not None:
        start = [{"role": "system", "content": system}]
    for shot in shots:
        start += [{"role": "user", "content": shot.question}, {"role": "assistant", "content": shot.answer}]
    return [*start, *messages]


def _ask(asked: Asked, generator: vllm.Generator, tokenizer: PreTrainedTokenizerFast, save_every: int) -> None:
    """Asks what is open, some problems at a time, and keeps every answer as it comes."""
    left = asked.open
    done = len(asked.problems) - len(left)
    if done:
        print(f"{asked.task.title}: {done} of {len(asked.problems)} problems were answered before", file=sys.stderr, flush=True)
    with progress(asked.task.title, len(asked.problems), done) as bar:
        for start in range(0, len(left), save_every):
            chunk = left[start : start + save_every]
            numbers = [asked.problems[index].row for index in chunk]
            for place, completions in generator.each([asked.prompts[index] for index in chunk], asked.sampling, numbers):
                responses = [_response(completion, tokenizer) for completion in completions]
                asked.file.append([{"key": asked.keys[chunk[place]], "responses": responses}])
                bar.update()
    if left:
        print(f"{asked.task.title}: all {len(asked.problems)} problems are answered", file=sys.stderr, flush=True)


def _response(completion: vllm.Completion, tokenizer: PreTrainedTokenizerFast) -> Record:
    text = answer_text(completion.token_ids, completion.finish_reason, tokenizer)
    return {"response": text, "tokens": len(completion.token_ids), "finish_reason": completion.finish_reason}


def _judged(asked: Asked, settings: EvalSettings) -> dict[str, Any]:
    """Judges a task's responses, writes them down with what they earned, and sums up."""
    responses = [asked.file[name]["responses"] for name in asked.keys]
    judgements = judge(asked.task, asked.problems, [[one["response"] for one in many] for many in responses], settings.verifiers)
    records = []
    for name, messages, problem, given, judged in zip(
        asked.keys, asked.messages, asked.problems, responses, judgements, strict=True
    ):
        several = [
            {**{field: one[field] for field in ("response", "tokens", "finish_reason")}, **judgement.as_dict()}
            for one, judgement in zip(given, judged, strict=True)
        ]
        group = {"group": problem.group} if problem.group else {}
        begin = {"begin": problem.begin} if problem.begin else {}
        known = {"key": name, "problem": problem.row, **group, "messages": messages, **begin}
        records.append({**known, "answer": problem.answer, "responses": several})
    asked.file.replace(records)
    return {
        "title": asked.task.title,
        "metrics": {name: asdict(value) for name, value in _metrics(asked.task, asked.problems, judgements, settings).items()},
        "groups": _groups(asked.task, asked.problems, judgements),
        "problems": len(asked.problems),
        "responses": sum(map(len, responses)),
        "cut_off": sum(one["finish_reason"] == "length" for many in responses for one in many) if not asked.task.choices else 0,
        "not_judged": sum(judgement.values is None for judged in judgements for judgement in judged),
        "shots": asked.shots,
        "shots_from": asked.shots_from if asked.shots else None,
        "max_tokens": asked.sampling.max_tokens,
    }


def _metrics(
    task: Task, problems: list[Problem], judgements: list[list[Judgement]], settings: EvalSettings
) -> dict[str, Estimate]:
    """Every metric's mean over responses, and pass@k of the first. What could not be judged is left out."""
    metrics: dict[str, Estimate] = {}
    for metric in task.metrics:
        sums, counts, groups = [], [], []
        for problem, judged in zip(problems, judgements, strict=True):
            values = [judgement.values[metric] for judgement in judged if judgement.values is not None]
            if values:
                sums.append(sum(earned for earned, _ in values))
                counts.append(sum(count for _, count in values))
                groups.append(problem.group)
        if not sums:
            raise UserError(f"{task.title}: none of the responses could be judged: {judgements[0][0].error}")
        metrics[metric] = estimate(sums, counts, _means(task, groups))
    for k in settings.pass_at:
        chances, groups = [], []
        for problem, judged in zip(problems, judgements, strict=True):
            values = [judgement.values[task.metrics[0]] for judgement in judged if judgement.values is not None]
            if len(values) >= k:
                chances.append(pass_at_k(len(values), sum(earned >= count for earned, count in values), k))
                groups.append(problem.group)
        if chances:
            metrics[f"pass@{k}"] = estimate(chances, [1] * len(chances), _means(task, groups))
    return metrics


def _means(task: Task, groups: list[str]) -> list[str] | None:
    """Each problem's group where the score is a mean over several, else None."""
    return groups if task.macro and len(set(groups)) > 1 else None


def _groups(task: Task, problems: list[Problem], judgements: list[list[Judgement]]) -> dict[str, dict[str, float]]:
    """The first metric by group, where there are several groups."""
    earned: dict[str, list[tuple[float, int]]] = {}
    for problem, judged in zip(problems, judgements, strict=True):
        values = [judgement.values[task.metrics[0]] for judgement in judged if judgement.values is not None]
        earned.setdefault(problem.group, []).extend(values)
    if len(earned) < 2:
        return {}
    sums = {name: (sum(value for value, _ in values), sum(count for _, count in values)) for name, values in earned.items()}
    return {name: {"value": total / count, "responses": count} for name, (total, count) in sorted(sums.items()) if count}
