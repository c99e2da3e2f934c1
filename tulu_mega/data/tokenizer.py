"""Loading the tokenizer, with what training needs of it checked."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tulu_mega.data.chat import Template
from tulu_mega.errors import UserError


def load_tokenizer(
    model: str, tokenizer: str | None = None, template: Template = "tulu", trust_remote_code: bool = False
) -> PreTrainedTokenizerFast:
    """The tokenizer of a directory or hub name.

    Args:
        model: where the model is; its own tokenizer is taken unless another is named.
        tokenizer: directory or hub name of another tokenizer, or None.
        template: ``"tokenizer"`` asks for one that ships a chat template.
        trust_remote_code: let transformers run Python code that comes with it.

    Raises:
        UserError: none there, not a fast one, no eos token, or no chat template where one is asked for.
    """
    source = tokenizer or model
    setting = "data.tokenizer" if tokenizer else "model.path"
    looks_local = source.startswith(("/", ".", "~")) or source.count("/") > 1
    path = Path(source).expanduser()
    if looks_local and not path.is_dir():
        raise UserError(f"{setting} = {source!r}: no such directory; give a directory with tokenizer.json or a hub name")
    try:
        loaded = AutoTokenizer.from_pretrained(str(path) if path.is_dir() else source, trust_remote_code=trust_remote_code)
    except Exception as error:  # OSError, ValueError, ImportError, KeyError or tokenizers' own, whatever is wrong with the files
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".")
        if path.is_dir() and not (path / "tokenizer.json").is_file():
            reason = "no tokenizer.json there"
        hint = "data.tokenizer names another directory or hub name"
        if "trust_remote_code" in str(error):
            hint = "set model.trust_remote_code = true if you trust the code that comes with it"
        raise UserError(f"{setting} = {source!r}: the tokenizer cannot be loaded: {reason}; {hint}") from None
    problems = []
    if not loaded.is_fast:
        problems.append(f"{setting} = {source!r}: not a fast tokenizer ({type(loaded).__name__}); expected tokenizer.json there")
    if loaded.eos_token is None:
        problems.append(
            f"{setting} = {source!r}: the tokenizer has no eos token to end an answer; set it in tokenizer_config.json"
        )
    if template == "tokenizer" and not loaded.chat_template:
        problems.append(f'{setting} = {source!r}: the tokenizer ships no chat template; use data.template = "tulu"')
    if problems:
        raise UserError(problems)
    return loaded
