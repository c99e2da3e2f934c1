"""`tulu-mega generate`: vLLM's answers to JSONL, or a conversation at a prompt."""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal

from tulu_mega.config import GenerateSettings
from tulu_mega.data.chat import prompt_ids, template_of
from tulu_mega.data.forms.reading import read
from tulu_mega.data.json_text import json_line
from tulu_mega.data.messages import Messages, conversation_of
from tulu_mega.data.places import check_writable
from tulu_mega.data.sources import JsonLines
from tulu_mega.data.stops import answer_text, stop_ids
from tulu_mega.errors import UserError
from tulu_mega.inference import offline as vllm
from tulu_mega.inference.adapters import Served, checked, served
from tulu_mega.inference.converse import converse
from tulu_mega.inference.progress import progress

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_ASKED = ("messages", "prompt", "input_ids")
"""Columns that are asked as they are."""
MAX_PROBLEMS = 10
"""Bad rows that are told at once."""


@dataclass(frozen=True)
class Prepared:
    """What is to be asked."""

    model: str
    tokenizer: PreTrainedTokenizerFast
    settings: GenerateSettings
    """with the template that is taken"""
    longest: int | None
    vocabulary: int
    rows: list[dict[str, Any]]
    """none where a conversation is held"""
    prompts: list[list[int]]
    """the rows', as token ids"""
    told: list[str]
    """what is to be said of the adapter"""


def generate(settings: GenerateSettings) -> None:
    """Answers every row of `settings.input`, or converses on the terminal when there is none.

    Raises:
        UserError: bad rows (several at once, with file and line), no model there, vLLM missing or failing. All that can be
            found without vLLM is found before it starts.
    """
    ready = prepared(settings)
    for line in ready.told:
        print(line, file=sys.stderr, flush=True)
    with served(ready.model, settings.adapter) as model:
        _answer(ready, model)


def _answer(ready: Prepared, model: Served) -> None:
    settings, tokenizer, rows = ready.settings, ready.tokenizer, ready.rows
    if rows:
        print(f"{settings.input}: {how_taken(rows, settings)}", file=sys.stderr)
    sampling = vllm.Sampling(
        max_tokens=settings.max_tokens,
        temperature=settings.temperature,
        top_p=settings.top_p,
        samples=settings.samples,
        seed=settings.seed,
        stop_ids=stop_ids(tokenizer, settings.template, ready.model),
    )
    server = vllm.Generator(
        model.model,
        dtype=vllm.DTYPES[settings.model.dtype],
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
        if settings.input is None:
            converse(generator, tokenizer, sampling, settings.system, partial(_conversation_ids, ready))
            return
        answers: dict[int, list[vllm.Completion]] = {}
        with progress(settings.input, len(rows), unit="row") as bar:
            for place, completions in generator.each(ready.prompts, sampling):
                answers[place] = completions
                bar.update()
    every = [answers[place] for place in range(len(rows))]
    if settings.output is None:
        _write(sys.stdout.buffer, rows, every, tokenizer)
        return
    try:
        with _appearing_when_complete(Path(settings.output)) as file:
            _write(file, rows, every, tokenizer)
    except OSError as error:
        raise UserError(f"output = {settings.output!r}: cannot be written: {error.strerror or error}") from None
    print(f"{sum(map(len, every))} responses to {len(rows)} prompts: {settings.output}", file=sys.stderr)


def prepared(settings: GenerateSettings) -> Prepared:
    """Everything that can be done without vLLM; nothing is written.

    Raises:
        UserError: as :func:`generate`.
    """
    from tulu_mega.data.tokenizer import load_tokenizer

    if settings.output is not None and settings.input is None:
        raise UserError(f"output = {settings.output!r} without an input; give input = a JSONL file, or no output to converse")
    vllm.check_vllm(settings.python)
    model = vllm.model_source(settings.model.path)
    config = vllm.model_config(model, settings.model.trust_remote_code)
    told = checked(settings.model.path, settings.adapter)
    tokenizer = load_tokenizer(model, None, settings.template, settings.model.trust_remote_code, setting=None)
    settings = settings.model_copy(update={"template": template_of(tokenizer, settings.template)})
    longest = vllm.longest_sequence(settings.model.path, config, settings.max_model_len)
    rows, prompts = _read(settings, tokenizer, longest, config.vocab_size) if settings.input is not None else ([], [])
    if settings.output is not None:
        _check_output(settings.output)
    return Prepared(model, tokenizer, settings, longest, config.vocab_size, rows, prompts, told)


def how_taken(rows: Sequence[dict[str, Any]], settings: GenerateSettings) -> str:
    """In words, how many rows are asked as what."""
    counts = Counter(_kind(_as_asked(row, settings), settings) for row in rows)
    template = {"tulu": "Tulu's template", "tokenizer": "the model's own template"}[settings.template]
    unused = ", and without the system message" if settings.system is not None else ""
    said = {
        "conversation": f"as conversations under {template}",
        "text": f"of prompt as they are, without a template{unused} (--prompts chat asks them as conversations)",
        "tokens": "of input_ids as they are",
    }
    return "; ".join(f"{counts[kind]:,} rows {how}" for kind, how in said.items() if counts[kind])


def _conversation_ids(ready: Prepared, messages: Messages) -> list[int]:
    ids = prompt_ids(messages, ready.tokenizer, ready.settings.template)
    vllm.check_ids(ids, ready.longest, ready.vocabulary)
    return ids


def _check_output(output: str) -> None:
    path = Path(output)
    if path.is_dir():
        raise UserError(f"output = {output!r} is a directory; give the path of a file")
    try:
        check_writable(path.parent)
    except OSError as error:
        raise UserError(f"output = {output!r}: its directory cannot be written to: {error.strerror}; choose another") from None


def _read(
    settings: GenerateSettings, tokenizer: PreTrainedTokenizerFast, longest: int | None, vocabulary: int
) -> tuple[list[dict[str, Any]], list[list[int]]]:
    """Rows and their prompts' token ids. Raises a UserError with the first bad rows, by file and line."""
    lines = _lines(settings.input)
    rows, prompts, problems = [], [], []
    for index in range(len(lines)):
        try:
            row = lines.row(index)
            _check_unicode(row)
            ids = _prompt(row, settings, tokenizer)
            vllm.check_ids(ids, longest, vocabulary)
        except ValueError as error:
            problems.append(f"{settings.input} line {lines.number(index)}: {error}")
        else:
            rows.append(row)
            prompts.append(ids)
        if len(problems) == MAX_PROBLEMS:
            raise UserError([*problems, f"{settings.input}: reading stopped here; later lines may be bad too"])
    if problems:
        raise UserError(problems)
    if not rows:
        raise UserError(f"{settings.input}: no rows in it; expected one JSON object a line with messages, prompt or input_ids")
    return rows, prompts


def _lines(file: str) -> JsonLines:
    try:
        return JsonLines(Path(file))
    except FileNotFoundError:
        raise UserError(f"{file}: no such file; give a JSONL file as input") from None
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror or error}") from None


def _as_asked(row: dict[str, Any], settings: GenerateSettings) -> dict[str, Any]:
    """A row with messages, where it has another form than the columns that are asked as they are.

    Raises:
        ValueError: it is of no known form.
    """
    if settings.format in ("auto", "prompt") and any(row.get(name) is not None for name in _ASKED):
        return row
    try:
        made = read(row, "prompt", settings.format).row
    except ValueError as error:
        nothing = all(row.get(name) is None for name in _ASKED)
        raise ValueError(f"has no messages, prompt or input_ids: {error}" if nothing else str(error)) from None
    return {name: value for name, value in made.items() if name == "messages" or name not in _ASKED}


def _kind(row: dict[str, Any], settings: GenerateSettings) -> Literal["conversation", "text", "tokens"]:
    """What a row is asked as.

    Raises:
        ValueError: it has not exactly one of the fields.
    """
    given = [name for name in _ASKED if row.get(name) is not None]
    if len(given) != 1:
        raise ValueError(f"has {' and '.join(given)}; expected exactly one of {', '.join(_ASKED)}")
    match given[0]:
        case "prompt" if isinstance(row["prompt"], list) or settings.prompts == "chat":
            return "conversation"
        case name:
            return {"messages": "conversation", "prompt": "text", "input_ids": "tokens"}[name]


def _prompt(row: dict[str, Any], settings: GenerateSettings, tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """A row's prompt as token ids: a conversation under the template, a raw text or the ids themselves."""
    row = _as_asked(row, settings)
    match _kind(row, settings):
        case "conversation":
            given = row.get("messages") if row.get("messages") is not None else row["prompt"]
            asked = [{"role": "user", "content": given}] if isinstance(given, str) else given
            messages, beside = conversation_of(row, asked, training=False)
            messages = _with_system(messages, settings.system)
            if messages[-1]["role"] == "assistant":
                raise ValueError("its last message is the assistant's, so there is nothing to answer; leave that message out")
            return prompt_ids(messages, tokenizer, settings.template, beside)
        case "text":
            if not isinstance(row["prompt"], str):
                raise ValueError(f"prompt is {type(row['prompt']).__name__}; expected text, or a list of messages")
            return tokenizer(row["prompt"], add_special_tokens=False, verbose=False)["input_ids"]
        case _:
            ids = row["input_ids"]
            if not isinstance(ids, list) or any(type(token) is not int for token in ids):
                raise ValueError("input_ids is not a list of whole numbers")
            return ids


def _check_unicode(row: Any) -> None:
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ValueError("has a lone surrogate (\\ud800 to \\udfff), which is not valid Unicode; remove it") from None


def _with_system(messages: list[dict[str, str]], system: str | None) -> list[dict[str, str]]:
    if system is None or messages[0]["role"] == "system":
        return messages
    return [{"role": "system", "content": system}, *messages]


def _write(
    file: BinaryIO, rows: list[dict[str, Any]], answers: list[list[vllm.Completion]], tokenizer: PreTrainedTokenizerFast
) -> None:
    """One line a response: the row, `response`, `output_ids`, `finish_reason`, and `sample` where there are several."""
    for row, completions in zip(rows, answers, strict=True):
        for sample, completion in enumerate(completions):
            answer = {
                "response": answer_text(completion.token_ids, completion.finish_reason, tokenizer),
                "output_ids": completion.token_ids,
                "finish_reason": completion.finish_reason,
            }
            number = {"sample": sample} if len(completions) > 1 else {}
            file.write(json_line({**row, **number, **answer}) + b"\n")
    file.flush()


@contextmanager
def _appearing_when_complete(path: Path) -> Iterator[BinaryIO]:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
