"""Low-rank adapters in vLLM: held apart from the model's weights where vLLM can, merged into them where it cannot."""

from __future__ import annotations

import contextlib
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tulu_mega.bridge.adapter_fit import fitting, remarks
from tulu_mega.bridge.files.config_json import read_config
from tulu_mega.bridge.files.hub import model_directory
from tulu_mega.bridge.files.peft import adapter_config, open_adapter
from tulu_mega.config.lora import LoraSettings
from tulu_mega.weight_transfer.adapters import apart_obstacles, largest_rank


def described(model: str, lora: LoraSettings) -> dict[str, Any]:
    """The content of the adapter_config.json of a run's adapters.

    Args:
        model: directory or hub name of the model that they are for.

    Raises:
        UserError: the directory that they begin with cannot be read.
    """
    if lora.adapter is None:
        return adapter_config(model, lora, False)
    told, files = open_adapter(lora.adapter)
    files.close()
    return told


@dataclass(frozen=True)
class Served:
    """A model as vLLM gets it."""

    model: str
    """its directory or hub name"""
    adapter: str | None = None
    """directory of the adapter that vLLM puts beside it"""
    rank: int = 0
    """the adapter's"""


@contextlib.contextmanager
def served(model: str, adapter: str | None, into: Path | None = None) -> Iterator[Served]:
    """A model with an adapter for vLLM, which holds it apart where it can; else a directory with the merged weights, for the time
    of this context.

    Args:
        model: as the settings name it.
        adapter: directory in PEFT's format that `checked` found to fit; None for the model as it is.
        into: where the merged model goes; a temporary directory when None.

    Raises:
        UserError: the merged model cannot be written.
    """
    if adapter is None:
        yield Served(model)
        return
    told, files = open_adapter(adapter)
    files.close()
    adapter = str(Path(adapter).expanduser().absolute())
    if not apart_obstacles(told):
        yield Served(model, adapter, largest_rank(told))
        return
    with contextlib.ExitStack() as stack:
        root = into or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tulu_mega_merged_")))
        yield Served(_merged(model, adapter, root / "merged"))


def how(adapter: str) -> str:
    """A line about how vLLM has an adapter."""
    told, files = open_adapter(adapter)
    files.close()
    return _line(adapter, apart_obstacles(told))


def checked(model: str, adapter: str | None) -> list[str]:
    """Lines about an adapter that a model is asked with.

    Args:
        model: as the settings name it.

    Raises:
        UserError: the adapter cannot be read, or is another model's.
    """
    if adapter is None:
        return []
    fitting(adapter, read_config(model_directory(model)), reward=False)
    return [*remarks(adapter, model), how(adapter)]


def _line(adapter: str, why: list[str]) -> str:
    if why:
        return f"adapter = {adapter}: vLLM cannot hold it apart ({'; '.join(why)}); the merged weights are served"
    return f"adapter = {adapter}: vLLM holds it apart from the model's weights"


def _merged(model: str, adapter: str, directory: Path) -> str:
    from tulu_mega.convert.run import run
    from tulu_mega.convert.settings import ConvertSettings

    source = model_directory(model)
    with contextlib.redirect_stdout(sys.stderr):  # the answers' is for answers
        run(ConvertSettings(source=str(source), output=str(directory), to="hf", adapter=adapter))
    return str(directory)


def holds(told: Mapping[str, Any], merged: bool) -> tuple[int, str]:
    """The rank for which servers are to be started that hold a run's adapters apart, 0 where they get them merged; and that in
    words.

    Args:
        told: the content of adapter_config.json.
        merged: whether the settings ask for merged weights.
    """
    why = ["rollout.adapters = 'merged'"] if merged else apart_obstacles(told)
    if why:
        return 0, f"servers get whole weights with the adapters merged: {'; '.join(why)}"
    return largest_rank(told), "servers hold the adapters apart: an update sends the adapters alone"
