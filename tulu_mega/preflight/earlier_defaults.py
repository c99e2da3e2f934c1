"""Settings of runs that began before a setting was there, or had its default of today."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tulu_mega.config import RunSettings
from tulu_mega.data.chat import template_of
from tulu_mega.data.tokenizer import load_tokenizer
from tulu_mega.errors import UserError

_NEW = ("data.rewritten", "rewards.math_accepts", "rewards.code_objects")
"""Settings that such runs did not know. The rows that the first speaks of could not be trained on then; that verifiers judge
otherwise is told by the pin of their files."""
_MOMENTS = "optim.moments"
"""Were float32 always."""
_FORMAT = "data.format"
"""Such runs read rows of messages and tokens alone, which `auto` takes first."""
_TEMPLATE = "data.template"
"""Was Tulu's where nothing was said."""


def as_before(name: str, before: Mapping[str, Any], settings: RunSettings) -> bool:
    """Whether a setting that is another one than a run began with means the same.

    Args:
        name: dotted.
        before: the run's settings by such names.
        settings: of now.
    """
    if name in _NEW:
        return name not in before
    if name == _MOMENTS:
        return name not in before and settings.optim.moments == "fp32"
    if name == _FORMAT:
        return name not in before and settings.data.format == "auto"
    if name != _TEMPLATE or settings.data.template != "auto":
        return False
    data, model = settings.data, settings.model
    try:
        tokenizer = load_tokenizer(model.path, data.tokenizer, "auto", model.trust_remote_code)
    except UserError:  # rows that have tokens already need none
        tokenizer = None
    return template_of(tokenizer, "auto") == before.get(name)
