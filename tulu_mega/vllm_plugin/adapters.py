"""A trainer's low-rank adapter in vLLM's model: received beside the weights, put in the place of the one before as a whole.

vLLM takes adapters from directories. This one comes from memory, through the same classes of vLLM's, and is there before any
request names it. vLLM throws all adapters out when an update ends, whatever it brought
(`LoRAModelRunnerMixin.reset_lora_state`), so the adapter is put in its place after that, before the server serves again.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from vllm.lora.lora_model import LoRAModel
from vllm.lora.peft_helper import PEFTHelper

from tulu_mega.weight_transfer.adapters import ID
from tulu_mega.weight_transfer.ledger import Ledger

_TOLD = 5
"""Modules that are named in one problem."""


class AdapterReport:
    """Methods that vLLM's workers get where it is asked without a server (``worker_extension_cls``)."""

    def left_out(self, number: int) -> list[str]:
        """Names of an adapter's modules that this worker's model has no place for, and leaves out without a word."""
        manager = self.model_runner.get_model().lora_manager
        return sorted(_left_out(manager, manager.get_adapter(number)))


def _left_out(manager: Any, adapter: LoRAModel) -> set[str]:
    places = {*manager.modules, *(each for parts in manager.packed_modules.values() for each in parts)}
    return adapter.loras.keys() - places


class AdapterLoader:
    """Takes updates that bring an adapter alone; a loader as `loading.ModelLoader` is.

    Args:
        model: vLLM's; it holds adapters apart if it was started with a rank for them.
    """

    def __init__(self, model: nn.Module):
        self._manager = getattr(model, "lora_manager", None)  # vLLM's `LoRAModelManager`, of servers with `--enable-lora`
        self._config: Mapping[str, Any] = {}
        self._staged: dict[str, Tensor] = {}
        """clones, as vLLM folds alpha / rank into B where it lies"""
        self._checked: LoRAModel | None = None
        self._held: tuple[int, LoRAModel] | None = None
        """version and adapter of the latest whole update"""

    @property
    def possible(self) -> bool:
        """Whether the model holds adapters apart."""
        return self._manager is not None

    @property
    def version(self) -> int | None:
        """Version of the adapter that came last."""
        return self._held[0] if self._held else None

    def begin(self, config: Mapping[str, Any]) -> None:
        """Makes room for an adapter.

        Args:
            config: the content of its adapter_config.json.
        """
        self._config, self._staged, self._checked = config, {}, None

    def load(self, tensors: list[tuple[str, Tensor]], _buffer: Tensor, _ledger: Ledger) -> None:
        """Keeps a copy of a bucket's tensors: the bucket is filled again, and other workers read it too."""
        self._staged |= {name: tensor.clone() for name, tensor in tensors}

    def check(self, ledger: Ledger) -> None:
        """Makes vLLM's adapter of what came, and notes what vLLM would refuse, or would leave out without a word."""
        try:
            self._checked = self._made()
        except Exception as error:  # ValueError and whatever else vLLM meets in a strange one
            ledger.wrong(f"the adapter was refused by vLLM: {type(error).__name__}: {str(error).strip()[:500]}")
            return
        loras = self._checked.loras
        for what, names in (
            ("match no module of vLLM's model", _left_out(self._manager, self._checked)),
            ("have one of the two matrices alone", {name for name, each in loras.items() if None in (each.lora_a, each.lora_b)}),
        ):
            if names:
                few = ", ".join(sorted(names)[:_TOLD])
                ledger.wrong(f"{len(names)} of the adapter's {len(loras)} modules {what}: {few}")
        if not loras:
            ledger.wrong("the adapter has no matrices")

    def finish(self, version: int) -> None:
        """Makes what was checked the adapter that `place` puts in."""
        self._held = version, self._checked
        self.leave()

    def leave(self) -> None:
        """Throws away what came of an update that is not whole."""
        self._staged, self._checked = {}, None

    def forget(self) -> None:
        """Has no adapter any more: the weights beside which it lay are others now."""
        self._held = None

    def place(self) -> None:
        """Puts the adapter into its slot, in place of any before, and once more where vLLM has thrown it out."""
        if self._held is None:
            return
        _, adapter = self._held
        if self._manager.get_adapter(ID) is not adapter:
            self._manager.remove_adapter(ID)
            self._manager.add_adapter(adapter)
        self._manager.activate_adapter(ID)

    def _made(self) -> LoRAModel:
        manager = self._manager
        helper = PEFTHelper.from_dict(dict(self._config))
        helper.validate_legal(manager.lora_config)
        mapper = getattr(manager.model, "hf_to_vllm_mapper", None)
        return LoRAModel.from_lora_tensors(
            ID,
            self._staged,
            helper,
            device=str(manager.device),
            dtype=manager.lora_config.lora_dtype,
            model_vocab_size=manager.vocab_size,
            weights_mapper=mapper.get_rename_mapper() if mapper is not None else None,
        )
