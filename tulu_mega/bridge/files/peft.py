"""Directories of low-rank adapters as PEFT writes them: adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from tulu_mega.bridge.files.companions import as_json, put_in_place
from tulu_mega.bridge.files.hf_files import HfCheckpoint, read_header
from tulu_mega.bridge.files.hf_writer import ShardWriter, tensor_info, write_durably
from tulu_mega.bridge.files.untrusted import read_json
from tulu_mega.config.lora import ALL, LINEARS, LoraSettings
from tulu_mega.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
HEAD = ["score"]
"""What is saved whole beside a reward model's adapters."""
_READ = (
    *("peft_type", "task_type", "r", "lora_alpha", "use_rslora"),
    *("target_modules", "modules_to_save", "bias", "init_lora_weights", "use_dora", "rank_pattern", "alpha_pattern"),
)
_WITHOUT_MEANING = (
    *("auto_mapping", "base_model_name_or_path", "inference_mode", "lora_dropout", "megatron_core", "peft_version"),
    *("qalora_group_size", "revision", "runtime_config", "loftq_config", "eva_config", "corda_config", "lora_ga_config"),
)
"""Fields that say nothing of what trained adapters compute. Any other has to be empty: what it asks for would be left out."""
_BESIDE_THE_WEIGHTS = (True, False, "gaussian", "orthogonal", "eva")
"""Ways to draw new adapters that leave the model's weights alone. Others change these first, so that the adapters go with
weights that are not the model's."""


def adapter_config(base: str, lora: LoraSettings, reward: bool) -> dict[str, Any]:
    """The content of adapter_config.json.

    Args:
        base: directory or hub name of the model that the adapters are for.
        reward: whether the model is a reward model.
    """
    targets = list(LINEARS) if lora.targets == ALL else lora.targets
    return {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if reward else "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": _short(lora.alpha),
        "use_rslora": lora.rslora,
        "target_modules": targets if isinstance(targets, str) else sorted(targets),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "modules_to_save": HEAD if reward else None,
        "use_dora": lora.dora,
        "rank_pattern": dict(lora.rank_pattern),
        "alpha_pattern": {each: _short(alpha) for each, alpha in lora.alpha_pattern.items()},
    }


def _short(alpha: float) -> float:
    """A whole number as one."""
    return int(alpha) if float(alpha).is_integer() else alpha


def open_adapter(path: str | Path) -> tuple[dict[str, Any], HfCheckpoint]:
    """The configuration of a directory of adapters, and its tensors.

    Raises:
        UserError: with everything that is wrong with the directory, or is not had here.
    """
    directory, problems = Path(path), []
    if not directory.is_dir():
        raise UserError(f"{directory}: no such directory; expected adapters as PEFT saves them ({CONFIG}, {WEIGHTS})")
    try:
        config = read_json(directory / CONFIG)
    except FileNotFoundError:
        raise UserError(f"{directory / CONFIG}: no such file; expected a directory of adapters as PEFT saves them") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{directory / CONFIG}: cannot be read as JSON: {error}") from None
    if not isinstance(config, dict):
        raise UserError(f"{directory / CONFIG}: holds {type(config).__name__}, expected a JSON object")
    if config.get("peft_type") != "LORA":
        problems.append(f"{directory / CONFIG}: peft_type = {config.get('peft_type')!r}, expected 'LORA'")
    problems += [
        f"{directory / CONFIG}: {name} = {str(value)[:80]} is not had here; expected {type(value)()!r}"
        for name, value in config.items()
        if value and name not in (*_READ, *_WITHOUT_MEANING)
    ]
    if (bias := config.get("bias") or "none") != "none":
        problems.append(f"{directory / CONFIG}: bias = {str(bias)[:80]} is not had here; expected 'none'")
    if (drawn := config.get("init_lora_weights", True)) not in _BESIDE_THE_WEIGHTS:
        problems.append(
            f"{directory / CONFIG}: init_lora_weights = {str(drawn)[:80]!r} changes the model's weights, too; convert the "
            "adapters by PEFT's path_initial_model_for_weight_conversion"
        )
    head, saved = HEAD if config.get("task_type") == "SEQ_CLS" else [], config.get("modules_to_save") or []
    if saved not in ([], head):
        problems.append(f"{directory / CONFIG}: modules_to_save = {str(saved)[:80]} is not had here; expected {head}")
    if not (directory / WEIGHTS).exists():
        problems.append(f"{directory / WEIGHTS}: no such file; save the adapters with safe_serialization=True")
    tensors = {} if problems else read_header(directory / WEIGHTS, problems)
    if problems:
        raise UserError(problems)
    return config, HfCheckpoint(directory, config, tensors, asks=CONFIG)


def settings_of(directory: str | Path) -> LoraSettings:
    """What a directory of adapters says of itself.

    Raises:
        UserError: as `open_adapter`; or it is of matrices that are not known here.
    """
    config, files = open_adapter(directory)
    targets = config.get("target_modules")
    try:
        return LoraSettings(
            rank=config.get("r"),
            alpha=config.get("lora_alpha"),
            rslora=config.get("use_rslora", False),
            dora=config.get("use_dora", False),
            targets=sorted(map(str, targets)) if isinstance(targets, list) else targets,
            rank_pattern=config.get("rank_pattern") or {},
            alpha_pattern=config.get("alpha_pattern") or {},
        )
    except ValidationError as error:
        theirs = {"rank": "r", "alpha": "lora_alpha", "rslora": "use_rslora", "dora": "use_dora", "targets": "target_modules"}
        wrong = {each["loc"][0]: each for each in error.errors()}  # of a setting of several types one problem
        raise UserError(
            [f"{files.path / CONFIG}: {theirs.get(at, at)} = {each['input']!r}: {each['msg']}" for at, each in wrong.items()]
        ) from None


def resolved(lora: LoraSettings | None) -> LoraSettings | None:
    """Settings with what the directory says that they name, where they name one.

    Raises:
        UserError: as :func:`settings_of`.
    """
    if lora is None or lora.adapter is None:
        return lora
    return settings_of(lora.adapter).model_copy(update=lora.of_the_base)


def write_adapters(final: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    """Writes a directory of adapters whole or not at all.

    Raises:
        UserError: something else lies at that place.
        OSError: it cannot be written.
    """
    if final.exists() and not (final.is_dir() and ((final / CONFIG).exists() or not any(final.iterdir()))):
        raise UserError(f"{final}: exists and is no directory of adapters; it is not replaced, choose another name")
    partial = final.with_name(f".{final.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        with ShardWriter(
            partial, {WEIGHTS: {name: tensor_info(each.shape, each.dtype) for name, each in tensors.items()}}
        ) as out:
            for name, each in tensors.items():
                out.add(name, each)
        write_durably(partial / CONFIG, as_json(config))
        put_in_place(partial, final)
    except OSError:
        shutil.rmtree(partial, ignore_errors=True)
        raise
