"""Compares what trainer and servers must have in common: the model's shape, its type, the program.

Workers refuse weights that do not fit, but one server at a time and after the weights were sent. The comparison comes before.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tulu_mega.outside import versions

if TYPE_CHECKING:
    from tulu_mega.weight_transfer.transports import Transport

ABOUT = "/tulu_mega/about"
"""Route of a server that tells what it is."""

_FIELDS = (
    "architectures", "model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "tie_word_embeddings", "attention_bias", "mlp_bias", "hidden_act", "rms_norm_eps",
    "sliding_window", "num_local_experts", "num_experts", "num_experts_per_tok", "moe_intermediate_size",
)  # fmt: skip
"""Of config.json: what decides which tensors a model has, or what it computes of them."""
_ROPE = ("rope_theta", "rope_type", "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
_SHOWN = 4


@dataclass(frozen=True)
class Model:
    """A model as one side has it."""

    name: str
    """that it is called there"""
    dtype: str
    """torch's name of the type that servers compute in"""
    config: Mapping[str, Any]
    """as `shape` gives it"""

    @classmethod
    def asked(cls, name: str, trained: str, served: str, config: Mapping[str, Any]) -> Model:
        """Return the model that the settings ask the servers to have.

        Args:
            trained, served: `model.dtype` and `rollout.dtype`.
            config: the model's config.json.
        """
        return cls(name, {"fp32": "float32", "bf16": "bfloat16"}[trained if served == "model" else served], shape(config))


def shape(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a config.json that both sides must have alike; absent fields are left out.

    transformers writes positions' parameters in two ways, by version: at the top, or in tables.
    """
    rope = {**config, **(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    rope.setdefault("rope_type", rope.get("type"))
    found = {name: config.get(name) for name in _FIELDS} | {name: rope.get(name) for name in _ROPE}
    plain = (str, int, float, bool, list)
    return {name: value for name, value in found.items() if isinstance(value, plain)}


def told(model: Model) -> dict[str, Any]:
    """Return a server's description of itself."""
    return {
        "model": {"name": model.name, "dtype": model.dtype, "config": dict(model.config)},
        "versions": _versions(),
        "program": _program(),
    }


def differences(url: str, theirs: Mapping[str, Any], ours: Model, transport: type[Transport] | None = None) -> list[str]:
    """Return the reasons why a server cannot take the trainer's weights, a line each.

    Args:
        theirs: as `told` gives it.
        transport: GPUs on both sides share more than a protocol; None where it is not chosen yet.
    """
    try:
        model, installed, program = theirs["model"], theirs["versions"], theirs["program"]
        name, dtype, config = model["name"], model["dtype"], model["config"]
        version = installed["tulu_mega"]
    except (KeyError, TypeError):
        return [f"{url}: says nothing of its model and versions, as an older tulu_mega does; install the trainer's there"]
    mine = _versions()
    if (version, program) != (mine["tulu_mega"], _program()):
        there, here = f"{version} (code {program})", f"{mine['tulu_mega']} (code {_program()})"
        return [f"{url}: its tulu_mega is {there}, the trainer's is {here}; install one at both ends"]
    found = []
    odd = [key for key, value in ours.config.items() if key in config and config[key] != value]
    if odd:
        few = ", ".join(f"{key} = {_value(config[key])} there, {_value(ours.config[key])} here" for key in odd[:_SHOWN])
        more = f" and {len(odd) - _SHOWN} more" if len(odd) > _SHOWN else ""
        found.append(
            f"{url}: serves another model, {name}, than {ours.name}: {few}{more}; start it with the trainer's model.path"
        )
    if dtype != ours.dtype:
        found.append(
            f"{url}: computes in {dtype}, this trainer asks for {ours.dtype}; give both the same model.dtype and rollout.dtype"
        )
    if transport and transport.device == "cuda":
        found += [
            f"{url}: has {package} {installed.get(package)}, this trainer {mine.get(package)}; rollout.transport = "
            f"{transport.name} needs one version at both ends: install it, or use rollout.transport = gloo"
            for package in ("torch", "nccl")
            if installed.get(package) != mine.get(package)
        ]
    return found


def between(servers: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return the differences that keep servers from answering alike: packages in another version than the first server's, a line
    a server.

    Args:
        servers: url -> as `told` gives it; those that tell nothing are left out.
    """
    told = {url: each["versions"] for url, each in servers.items() if "versions" in each}
    first = next(iter(told), "")
    found = []
    for url, each in told.items():
        names = [name for name in ("vllm", "torch", "transformers") if each.get(name) != told[first].get(name)]
        if names:
            few = ", ".join(f"{name} {each.get(name)} there, {told[first].get(name)} at {first}" for name in names)
            found.append(f"{url}: {few}; give all servers the same, or they answer the same prompts otherwise")
    return found


def _value(value: Any) -> Any:
    return ", ".join(map(str, value)) if isinstance(value, list) else value


@functools.cache
def _versions() -> dict[str, str]:
    return versions.installed()


@functools.cache
def _program() -> str:
    """A digest of the code that speaks of weights at both ends, which changes more often than the version."""
    package = Path(__file__).parents[1]
    taken = hashlib.sha256()
    for folder in ("weight_transfer", "vllm_plugin"):
        for file in sorted((package / folder).rglob("*.py")):
            taken.update(str(file.relative_to(package)).encode() + b"\0" + file.read_bytes())
    return taken.hexdigest()[:10]
