"""Loading the tokenizer, with what training needs of it checked."""

from __future__ import annotations

import os
import re
from contextlib import contextmanager
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.utils import logging

from tulu_mega.bridge.files.companions import CONFIG, TOKENIZER
from tulu_mega.bridge.files.untrusted import MAX_JSON_BYTES, open_plain, read_json
from tulu_mega.data import limits
from tulu_mega.data.chat import Template
from tulu_mega.data.template_day import dated
from tulu_mega.errors import UserError
from tulu_mega.pins.digest import Stamp, stamp

_VOCABULARY = "tokenizer.model"
_SMALL = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.json", CONFIG)
"""Files that Python parses."""
_MOST_BYTES = {".jinja": 16 << 20}
_PROBE = "<|user|>\nThe  quick, 1234 Größen!\n\n    def f(x): # 😀\n"
"""Text of which conversions that go wrong make other tokens: blanks in a row, lines, digits, characters of several bytes."""
_CHARACTERS = "".join(map(chr, range(33, 127))) + "é中😀"
"""Characters that a tokenizer has tokens for, be it that of the unknown: all of ASCII's, and some of several bytes."""


def load_tokenizer(
    model: str,
    tokenizer: str | None = None,
    template: Literal["auto"] | Template = "auto",
    trust_remote_code: bool = False,
    setting: str | None = "data.tokenizer",
    day: str | None = None,
) -> PreTrainedTokenizerFast:
    """The tokenizer of a directory or hub name.

    Where there is no tokenizer.json, transformers makes one of tokenizer.model, be it a sentencepiece model or tiktoken's list of
    ranks; what it makes of the former is held against sentencepiece itself.

    Args:
        model: where the model is; its own tokenizer is taken unless another is named.
        tokenizer: directory or hub name of another tokenizer, or None.
        template: ``"tokenizer"`` asks for one that ships a chat template.
        trust_remote_code: let transformers run Python code that comes with it.
        setting: the command's setting that names another tokenizer, for messages; None where it has none.
        day: that a chat template may write, ``2026-11-30``; None for the one on which it is rendered.

    Raises:
        UserError: none there, not a fast one, no eos token, no chat template where one is asked for, a package that reads its
            vocabulary is missing, or other tokens come out than sentencepiece gives.
    """
    source = tokenizer or model
    named = f"{setting if tokenizer else 'model.path'} = {source!r}"
    looks_local = source.startswith(("/", ".", "~")) or source.count("/") > 1
    path = Path(source).expanduser()
    if looks_local and not path.is_dir():
        raise UserError(f"{named}: no such directory; give a directory with tokenizer.json or a hub name")
    kind = _vocabulary_kind(path)
    if kind and not find_spec(kind):
        raise UserError(f"{named}: {_VOCABULARY} needs the package {kind!r}; install it, or give tokenizer.json")
    try:
        if path.is_dir():
            _check_files(path)
        with _quiet():  # a list of ranks is first taken for a sentencepiece model, with a warning
            loaded = AutoTokenizer.from_pretrained(str(path) if path.is_dir() else source, trust_remote_code=trust_remote_code)
            loaded(_PROBE, add_special_tokens=False, verbose=False)  # of a tokenizer whose fields do not go together
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # whatever is wrong with the files; what Rust panics come as is no Exception
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".")
        if path.is_dir() and not (path / "tokenizer.json").is_file():
            reason = f"{_VOCABULARY} cannot be used ({reason})" if kind else "no tokenizer.json there"
        hint = f"{setting} names another directory or hub name" if setting else "put the files of the model's tokenizer there"
        if "trust_remote_code" in str(error):
            hint = "set model.trust_remote_code = true if you trust the code that comes with it"
        raise UserError(f"{named}: the tokenizer cannot be loaded: {reason}; {hint}") from None
    problems = []
    if not loaded.is_fast:
        problems.append(f"{named}: not a fast tokenizer ({type(loaded).__name__}); expected tokenizer.json there")
    if loaded.eos_token is None:
        problems.append(f"{named}: the tokenizer has no eos token to end an answer; set it in tokenizer_config.json")
    if kind == "sentencepiece" and not _as_sentencepiece(loaded, path / _VOCABULARY):
        problems.append(
            f"{named}: transformers' {type(loaded).__name__} makes other tokens than {_VOCABULARY} itself; "
            'name the model\'s class in tokenizer_config.json (as "tokenizer_class": "LlamaTokenizer"), or give tokenizer.json'
        )
    each = loaded([*_CHARACTERS], add_special_tokens=False)["input_ids"]
    if lost := [char for char, ids in zip(_CHARACTERS, each, strict=True) if not ids or "\ufffd" in loaded.decode(ids)]:
        problems.append(f"{named}: the tokenizer has no token for {''.join(lost)!r} and would leave it out; give a whole one")
    if loaded.is_fast and (share := getattr(loaded.backend_tokenizer.model, "dropout", None)):  # of BPE alone
        problems.append(
            f"{named}: tokenizer.json asks for dropout = {share:g}: other tokens of the same text each time; set it to null"
        )
    if template == "tokenizer" and not loaded.chat_template:
        problems.append(f'{named}: the tokenizer ships no chat template; use the template "tulu"')
    if problems:
        raise UserError(problems)
    loaded.chat_template = dated(loaded.chat_template, day)
    return loaded


def _check_files(directory: Path) -> None:
    """Looks at a tokenizer's files before anybody loads them.

    Raises:
        OSError: one is no plain file.
        ValueError: one is too large or no JSON, or loading it takes more than it may.
    """
    for file in (directory / name for name in (*TOKENIZER, CONFIG)):
        if not file.exists():
            continue
        limit = _MOST_BYTES.get(file.suffix, MAX_JSON_BYTES)
        try:
            if file.name in _SMALL:
                read_json(file, _MOST_BYTES[".jinja"])
                continue
            with open_plain(file) as content:
                size = os.fstat(content.fileno()).st_size
            if size > limit:
                raise ValueError(f"it has {size} bytes, at most {limit} are read")
            if file.name == "tokenizer.json":
                _try_once(str(file.absolute()), stamp(file))  # the process may have another working directory
        except (OSError, ValueError) as error:
            raise ValueError(f"{file.name}: {error}") from None


@lru_cache(maxsize=64)
def _try_once(file: str, stamp: Stamp) -> None:
    limits.tried(file)


def _vocabulary_kind(path: Path) -> Literal["sentencepiece", "tiktoken"] | None:
    """Return the kind of a directory's tokenizer.model; None where another file makes the tokenizer."""
    file = path / _VOCABULARY
    if (path / "tokenizer.json").is_file() or not file.is_file():
        return None
    with open(file, "rb") as content:
        ranks = re.match(rb"[A-Za-z0-9+/]+=* \d+\r?\n", content.read(4096))  # base64 and a number
    return "tiktoken" if ranks else "sentencepiece"


def _as_sentencepiece(tokenizer: PreTrainedTokenizerFast, file: Path) -> bool:
    from sentencepiece import SentencePieceProcessor

    return tokenizer(_PROBE, add_special_tokens=False)["input_ids"] == SentencePieceProcessor(model_file=str(file)).encode(_PROBE)


@contextmanager
def _quiet():
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
