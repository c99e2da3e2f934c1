"""Settings of the commands that ask a model: `tulu-mega score` and `tulu-mega generate`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from tulu_mega.config.run import EngineSettings
from tulu_mega.config.sections import AskedTemplate, FormName, ModelSettings, PositiveInt, Section


class ScoreSettings(EngineSettings):
    """`tulu-mega score`: per-token log-probabilities of given texts, or a reward model's scores."""

    input: str
    """JSONL (also under gzip or zstd); rows of `messages`, `text` or `input_ids`, with an optional `id`; or conversations of
    another form (see `format`)."""
    output: str
    """JSONL to write, in input order: `id`, `input_ids`, `logprobs` (natural log, tokens 2..n), `sum`; of a reward model `id`,
    `input_ids`, `score` (at the last token)."""
    format: FormName = "auto"
    """Form of rows that have none of these columns, such as `sharegpt` or `alpaca`; `auto` tells each row's by its columns."""
    template: AskedTemplate = "auto"
    tokenizer: str | None = None
    """Directory or hub name of the tokenizer; the model's own when unset."""
    adapter: str | None = None
    """Directory of low-rank adapters in PEFT's format, which are put beside the model's weights."""
    pack_length: PositiveInt = 8192
    """Tokens a packed micro-batch may hold on one data-parallel rank (a longer text has one of its own)."""


class GenerateSettings(Section):
    """`tulu-mega generate`: vLLM on a model directory, from JSONL or at a prompt."""

    model: ModelSettings
    adapter: str | None = None
    """Directory of low-rank adapters in PEFT's format: vLLM holds them beside the model's weights, or they are merged where it
    cannot."""
    input: str | None = None
    """JSONL (also under gzip or zstd); rows of `messages` (a `prompt` that is a list of messages is the same), of `prompt` text,
    of `input_ids`, or prompts of another form (see `format`). Unset: an interactive prompt."""
    format: FormName = "auto"
    """Form of rows that have none of these columns, such as `sharegpt` or `alpaca`; `auto` tells each row's by its columns."""
    prompts: Literal["raw", "chat"] = "raw"
    """How rows of `prompt` text are asked: `raw` as they are, for the model to go on with, no template around them and no BOS
    before them; `chat` as a user's message under the template."""
    output: str | None = None
    """JSONL to write: the row with `response`, `output_ids`, `finish_reason`. Unset with `input`: standard output."""
    template: AskedTemplate = "auto"
    system: str | None = None
    """System message put before a conversation that has none."""
    max_tokens: PositiveInt = 512
    temperature: Annotated[float, Field(ge=0)] = 0.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    samples: PositiveInt = 1
    """Responses to each prompt."""
    seed: int = 0
    tensor: PositiveInt = 1
    """vLLM's tensor parallel size."""
    max_model_len: PositiveInt | None = None
    """Longest prompt and response together; the model's own limit when unset."""
    python: str | None = None
    """Python that starts vLLM: of another environment with vLLM and this version of tulu_mega. The one that runs this command
    when unset."""
