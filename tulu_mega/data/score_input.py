"""Rows to score: texts, conversations or tokens from a JSONL file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tulu_mega.config import FormName, ScoreSettings
from tulu_mega.data.chat import Template, conversation_ids, template_of
from tulu_mega.data.forms.reading import read as read_form
from tulu_mega.data.messages import check_unicode, conversation_of
from tulu_mega.data.sources import JsonLines
from tulu_mega.data.tokenizer import load_tokenizer
from tulu_mega.errors import UserError

_AS_IT_IS = ("text", "input_ids")
_COLUMNS = ("messages", *_AS_IT_IS)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def read(file: str) -> list[tuple[str, dict[str, Any]]]:
    """Every row of a JSONL file with a name for it, ``FILE line N``.

    Raises:
        UserError: the file is missing, empty, or lines of it are not JSON objects.
    """
    try:
        lines = JsonLines(file)
    except OSError as error:
        raise UserError(f"input = {file}: cannot be read: {error.strerror}; give a JSONL file") from None
    rows, problems = [], []
    for index in range(len(lines)):
        where = f"{lines.name} {lines.unit} {lines.number(index)}"
        try:
            rows.append((where, lines.row(index)))
        except ValueError as error:
            problems.append(f"{where}: {error}")
    if problems:
        raise UserError(problems[:20])
    if not rows:
        raise UserError(f"input = {file}: has no rows; expected one JSON object on each line")
    return rows


def needs_reading(row: dict[str, Any], form: FormName) -> bool:
    """Whether a row is of another form than those that are scored as they are."""
    return form not in ("auto", "tokens") or all(row.get(name) is None for name in _COLUMNS)


@dataclass(frozen=True)
class Encoder:
    """A row to the tokens that are scored.

    ``messages`` are rendered by the template, assistant turns or not; ``text`` is taken as it is, with no BOS put before it;
    ``input_ids`` need no tokenizer.
    """

    tokenizer: PreTrainedTokenizerFast | None
    template: Template
    vocab_size: int | None = None
    form: FormName = "auto"
    """form of rows that have none of these columns, or of all rows where it is named"""

    def __call__(self, row: dict[str, Any]) -> list[int]:
        """
        Raises:
            ValueError: the row has nothing to score, or tokens that the model does not have.
        """
        if needs_reading(row, self.form):
            row = self._read(row)
        given = [name for name in _COLUMNS if row.get(name) is not None]
        if len(given) != 1:
            raise ValueError(f"has {', '.join(given) or 'none'} of messages, text and input_ids; expected exactly one")
        if given == ["input_ids"]:
            ids = row["input_ids"]
            if not isinstance(ids, list) or not all(type(token) is int and token >= 0 for token in ids):
                raise ValueError(f"input_ids is {ids!r:.60}; expected a list of whole numbers")
        elif given == ["text"]:
            if not isinstance(row["text"], str):
                raise ValueError(f"text is {type(row['text']).__name__}; expected a string")
            check_unicode("text", row["text"])
            ids = self.tokenizer(row["text"], add_special_tokens=False)["input_ids"]
        else:
            messages, beside = conversation_of(row, row["messages"], training=False)
            ids = conversation_ids(messages, self.tokenizer, self.template, beside)
        if not ids:
            raise ValueError("has no tokens; expected at least one")
        if self.vocab_size is not None and max(ids) >= self.vocab_size:
            raise ValueError(f"holds token {max(ids)}, but the model's vocabulary has {self.vocab_size} entries")
        return ids

    def _read(self, row: dict[str, Any]) -> dict[str, Any]:
        try:
            made = read_form(row, "conversation", self.form).row
        except ValueError as error:
            nothing = all(row.get(name) is None for name in _COLUMNS)
            raise ValueError(f"has none of messages, text and input_ids: {error}" if nothing else str(error)) from None
        return {name: value for name, value in made.items() if name not in _AS_IT_IS}


def encoder(settings: ScoreSettings, rows: list[dict[str, Any]], vocab_size: int | None) -> Encoder:
    """The encoder for these rows, with a tokenizer if any of them needs one.

    Raises:
        UserError: the tokenizer cannot be loaded.
    """
    tokenizer, template = None, "tulu"
    if any(needs_reading(row, settings.format) or row.get("input_ids") is None for row in rows):
        model = settings.model
        asked = (model.path, settings.tokenizer, settings.template, model.trust_remote_code)
        tokenizer = load_tokenizer(*asked, setting="tokenizer")
        template = template_of(tokenizer, settings.template)
    return Encoder(tokenizer, template, vocab_size, settings.format)
