"""`tulu-mega generate`: vLLM's answers to JSONL, or a conversation at a prompt."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from tulu_mega.config import GenerateSettings
from tulu_mega.data.chat import check_messages, prompt_ids, template_of
from tulu_mega.data.sources import JsonLines
from tulu_mega.errors import UserError
from tulu_mega.inference import offline as vllm

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

MAX_PROBLEMS = 10
"""Bad rows that are told at once."""


def generate(settings: GenerateSettings) -> None:
    """Answers every row of `settings.input`, or converses on the terminal when there is none.

    Raises:
        UserError: bad rows (several at once, with file and line), no model there, vLLM missing or failing. All that can be
            found without vLLM is found before it starts.
    """
    from tulu_mega.data.tokenizer import load_tokenizer

    if settings.output is not None and settings.input is None:
        raise UserError(f"output = {settings.output!r} without an input; give input = a JSONL file, or no output to converse")
    vllm.check_vllm()
    model = vllm.model_source(settings.model.path)
    config = vllm.model_config(model, settings.model.trust_remote_code)
    tokenizer = load_tokenizer(model, None, settings.template, settings.model.trust_remote_code, setting=None)
    settings = settings.model_copy(update={"template": template_of(tokenizer, settings.template)})
    longest = vllm.longest_sequence(settings.model.path, config, settings.max_model_len)
    rows, prompts = _read(settings, tokenizer, longest, config.vocab_size) if settings.input is not None else ([], [])
    output = _check_output(settings.output) if settings.output is not None else None
    sampling = vllm.Sampling(
        max_tokens=settings.max_tokens,
        temperature=settings.temperature,
        top_p=settings.top_p,
        samples=settings.samples,
        seed=settings.seed,
        stop_ids=(tokenizer.eos_token_id,),
    )
    server = vllm.Generator(
        model,
        dtype=vllm.DTYPES[settings.model.dtype],
        tensor=settings.tensor,
        max_model_len=settings.max_model_len,
        seed=settings.seed,
        trust_remote_code=settings.model.trust_remote_code,
        progress=settings.input is not None,
    )
    print(f"Starting vLLM on {settings.model.path} ...", file=sys.stderr, flush=True)
    with server as generator:
        if settings.input is None:
            _converse(generator, tokenizer, settings, sampling, longest)
            return
        answers = generator(prompts, sampling)
    if output is None:
        _write(sys.stdout, rows, answers, tokenizer)
    else:
        with _appearing_when_complete(output) as file:
            _write(file, rows, answers, tokenizer)
        print(f"{sum(map(len, answers))} responses to {len(rows)} prompts: {output}", file=sys.stderr)


def _check_output(output: str) -> Path:
    path = Path(output)
    if path.is_dir():
        raise UserError(f"output = {output!r} is a directory; give the path of a file")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"output = {output!r}: its directory cannot be made: {error.strerror}") from None
    if not os.access(path.parent, os.W_OK):
        raise UserError(f"output = {output!r}: its directory cannot be written to; choose another")
    return path


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


def _prompt(row: dict[str, Any], settings: GenerateSettings, tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """A row's prompt as token ids: a conversation under the template, a raw text or the ids themselves."""
    given = [name for name in ("messages", "prompt", "input_ids") if row.get(name) is not None]
    if len(given) != 1:
        raise ValueError(f"has {' and '.join(given) or 'no messages, prompt or input_ids'}; expected exactly one of the three")
    match given[0]:
        case "messages":
            messages = _with_system(check_messages(row["messages"], training=False), settings.system)
            if messages[-1]["role"] == "assistant":
                raise ValueError("its last message is the assistant's, so there is nothing to answer; leave that message out")
            return prompt_ids(messages, tokenizer, settings.template)
        case "prompt":
            if not isinstance(row["prompt"], str):
                raise ValueError(f"prompt is {type(row['prompt']).__name__}; expected text (a conversation goes into messages)")
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
    file: TextIO, rows: list[dict[str, Any]], answers: list[list[vllm.Completion]], tokenizer: PreTrainedTokenizerFast
) -> None:
    """One line a response: the row, `response`, `output_ids`, `finish_reason`, and `sample` where there are several."""
    for row, completions in zip(rows, answers, strict=True):
        for sample, completion in enumerate(completions):
            answer = {
                "response": tokenizer.decode(completion.token_ids, skip_special_tokens=True),
                "output_ids": completion.token_ids,
                "finish_reason": completion.finish_reason,
            }
            number = {"sample": sample} if len(completions) > 1 else {}
            file.write(json.dumps({**row, **number, **answer}, ensure_ascii=False) + "\n")
    file.flush()


@contextmanager
def _appearing_when_complete(path: Path) -> Iterator[TextIO]:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            yield file
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _converse(
    generator: vllm.Generator,
    tokenizer: PreTrainedTokenizerFast,
    settings: GenerateSettings,
    sampling: vllm.Sampling,
    longest: int | None,
) -> None:
    """A conversation on the terminal, kept from turn to turn."""
    print("Type a message. /reset begins anew, /quit or Ctrl-D ends.", file=sys.stderr)
    start = [{"role": "system", "content": settings.system}] if settings.system is not None else []
    messages = list(start)
    while True:
        try:
            text = input("> ").strip()
        except EOFError:
            print(file=sys.stderr)
            return
        if text == "/quit":
            return
        if text == "/reset":
            messages = list(start)
            continue
        if not text:
            continue
        asked = [*messages, {"role": "user", "content": text}]
        try:
            ids = prompt_ids(asked, tokenizer, settings.template)
            vllm.check_ids(ids, longest, len(tokenizer))
        except ValueError as problem:
            print(f"{problem} (/reset begins anew)", file=sys.stderr)
            continue
        for completion in generator([ids], sampling)[0]:
            response = tokenizer.decode(completion.token_ids, skip_special_tokens=True)
            print(response + (" [cut off]" if completion.finish_reason == "length" else ""), flush=True)
        messages = [*asked, {"role": "assistant", "content": response}]
