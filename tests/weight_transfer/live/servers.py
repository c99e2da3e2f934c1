"""Real vLLM servers that take weights, started once and shared by the tests that need such a one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from tulu_mega.inference.command_line import ServerOptions, core_shares
from tulu_mega.inference.pool import ServerPool
from tulu_mega.vllm_plugin.gate import server_arguments
from tulu_mega.weight_transfer.control import ServerControl
from tulu_mega.weight_transfer.server import ServerAddress


class Servers:
    """Servers by model and size, started when first asked for; a context manager."""

    def __init__(self, root: Path):
        self._root = root
        self._stack = contextlib.ExitStack()
        self._found: dict[tuple[str, int, str, bool], ServerPool] = {}

    def __enter__(self) -> Servers:
        return self

    def __exit__(self, *error) -> None:
        self._stack.__exit__(*error)

    def start(self, model: str, tensor: int, dtype: str = "float32", fp8: bool = False, lora_rank: int = 0) -> ServerPool:
        """Returns at once.

        Args:
            lora_rank: of adapters that the server holds apart, if it is not there yet.
        """
        key = model, tensor, dtype, fp8
        sizes = dict(tensor=tensor, max_model_len=256, concurrency=16)
        options = ServerOptions(model, dtype=dtype, fp8=fp8, lora_rank=lora_rank, extra=tuple(server_arguments()), **sizes)
        if key not in self._found:
            directory = self._root / f"pool_{len(self._found)}"
            directory.mkdir(parents=True)
            cores = core_shares([0, 1], 1, tensor)
            pool = self._stack.enter_context(ServerPool(options, directory, cores=cores, restarts=0, start_timeout=580))
            self._found[key] = pool
        return self._found[key]

    def get(self, model: str, tensor: int, dtype: str = "float32", fp8: bool = False, lora_rank: int = 0) -> ServerAddress:
        """The server, ready; its model has whatever weights the last test gave it."""
        (address,) = self.start(model, tensor, dtype, fp8, lora_rank).wait()
        return address


@contextlib.contextmanager
def one(
    model: str, directory: Path, tensor: int = 1, dtype: str = "float32", fp8: bool = False, lora_rank: int = 0
) -> Iterator[ServerAddress]:
    """A server for one test alone."""
    with Servers(directory) as servers:
        yield servers.get(model, tensor, dtype, fp8, lora_rank)


def is_paused(control: ServerControl) -> bool:
    """Whether a server holds requests back."""
    return bool(control._ask("GET", "/is_paused")["is_paused"])


def weight_checksums(control: ServerControl) -> dict[str, str]:
    """vLLM's own hashes of a server's parameters, after its processing."""
    return control._ask("POST", "/weight_checker", json={"action": "checksum"})["checksums"]
