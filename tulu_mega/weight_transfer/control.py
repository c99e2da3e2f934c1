"""The control plane of one vLLM server: its routes for pausing and for weights, as plain calls that end in finite time.

Has the methods of vLLM's ``VLLMWeightSyncClient``, so that vLLM's own trainer engines may drive it too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import httpx

from tulu_mega.weight_transfer.counterpart import ABOUT
from tulu_mega.weight_transfer.server import ServerFailure

CONNECT_SECONDS = 10.0
T = TypeVar("T")


class ServerControl:
    """One server. Several threads may call it.

    Args:
        url: such as ``http://127.0.0.1:8000``.
        key: sent as bearer token with every request; None for a server without.
        timeout_s: seconds that any one call may take.

    Every method raises `ServerFailure` when the server does not do as asked, within that time.
    """

    def __init__(self, url: str, key: str | None, timeout_s: float):
        self.url = url.rstrip("/")
        self._timeout = timeout_s
        self._client = httpx.Client(
            base_url=self.url,
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=httpx.Timeout(timeout_s, connect=min(CONNECT_SECONDS, timeout_s)),
            trust_env=False,  # a proxy has no business between a trainer and its servers
        )

    def close(self) -> None:
        """Closes the connections."""
        self._client.close()

    def pause(self) -> None:
        """Abort generation, and hold new requests back until `resume`."""
        self._ask("POST", "/pause", params={"mode": "abort"})

    def resume(self) -> None:
        """Lets requests in again; the server refuses while its weights are not whole."""
        self._ask("POST", "/resume")

    def reset_prefix_cache(self) -> None:
        """Empty the cache of prompts. vLLM answers 200 even where it failed, so the answer's body is read."""
        if self._ask("POST", "/reset_prefix_cache").get("success") is not True:
            raise ServerFailure(self.url, "the prefix cache could not be emptied: blocks are still held by requests")

    def weight_info(self) -> dict[str, Any]:
        """``{"weight_version": ...}``"""
        return self._ask("GET", "/weight_info")

    def about(self) -> dict[str, Any]:
        """Return the server's description of itself; see `counterpart.told`."""
        return self._ask("GET", ABOUT)

    def world_size(self) -> int:
        """Return the number of workers that hold a part of the model."""
        told = self._ask("GET", "/get_world_size").get("world_size")
        if type(told) is not int or told < 1:
            raise ServerFailure(self.url, f"GET /get_world_size: {str(told)[:200]!r} workers")
        return told

    def weights_status(self) -> list[dict[str, Any]]:
        """Each worker's state, as `vllm_plugin.worker.WeightsReport` describes it."""
        found = self.call_workers("weights_status")
        if all(_texts(each.get(kind)) for each in found for kind in ("problems", "unattached")):
            return found
        raise ServerFailure(self.url, f"weights_status: expected lists of problems from each worker, got {str(found)[:200]}")

    def arrived_checksums(self) -> list[dict[str, str]]:
        """For each worker: Hugging Face name -> hash of the bytes that arrived in the last update."""
        found = self.call_workers("arrived_checksums")
        if all(_texts(list(each.values())) for each in found):
            return found
        raise ServerFailure(self.url, f"arrived_checksums: expected hashes by name from each worker, got {str(found)[:200]}")

    def check_workers(self, kind: str = "problems") -> None:
        """Raises `ServerFailure` with what the workers found wrong.

        Args:
            kind: `problems` with the update, or `unattached`: with the connection to the senders.
        """
        problems = [problem for worker in self.weights_status() for problem in worker[kind]]
        if problems:
            more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
            raise ServerFailure(self.url, "; ".join(problems[:3]) + more)

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Has the workers attach to the senders."""
        self._ask("POST", "/init_weight_transfer_engine", json={"init_info": init_info})

    def start_weight_update(self) -> None:
        """Opens an update; one that was left open by a trainer that died is closed, and its weights stay unusable."""
        self._ask("POST", "/start_weight_update")

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Passes a message of `weight_transfer.protocol` to the workers; what they make of it is in `weights_status`."""
        self._ask("POST", "/update_weights", json={"update_info": update_info})

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """Closes an update; the server refuses unless all workers committed it. From here on responses bear the version."""
        self._ask("POST", "/finish_weight_update", json={"weight_version": weight_version})

    def call_workers(self, method: str) -> list[dict[str, Any]]:
        """Calls a method of the workers and returns what each of them answers, an object."""
        found = self._ask("POST", "/collective_rpc", json={"method": method}).get("results")
        if not isinstance(found, list) or not all(isinstance(each, dict) for each in found):
            raise ServerFailure(self.url, f"{method}: expected an object from each worker, got {str(found)[:200]}")
        return found

    def _ask(self, verb: str, path: str, **arguments: Any) -> dict[str, Any]:
        what = f"{verb} {path}"
        try:
            response = self._client.request(verb, path, **arguments)
        except httpx.TimeoutException:
            raise ServerFailure(self.url, f"{what}: no answer within {self._timeout:g} s") from None
        except httpx.HTTPError as error:
            raise ServerFailure(self.url, f"{what}: {str(error) or type(error).__name__}") from None
        try:
            body = response.json()
        except (ValueError, RecursionError):
            body = None
        if response.status_code != 200:
            raise ServerFailure(self.url, f"{what}: status {response.status_code}: {_message(body, response.text)}")
        if not isinstance(body, dict):
            raise ServerFailure(self.url, f"{what}: expected a JSON object, got {response.text[:200]!r}")
        return body


def each_server(controls: Iterable[ServerControl], action: Callable[[ServerControl], T]) -> tuple[dict[str, T], dict[str, str]]:
    """Does something to several servers at once.

    Returns:
        url -> result; url -> what went wrong.
    """
    controls = list(controls)
    results: dict[str, T] = {}
    failed: dict[str, str] = {}
    if controls:
        with ThreadPoolExecutor(len(controls)) as pool:
            for control, future in [(control, pool.submit(action, control)) for control in controls]:
                try:
                    results[control.url] = future.result()
                except ServerFailure as failure:
                    failed[control.url] = failure.reason
    return results, failed


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(each, str) for each in value)


def _message(body: Any, text: str) -> str:
    """Return the text of an error, from any of the forms that vLLM's handlers use."""
    if isinstance(body, dict):
        error = body.get("error", body.get("detail"))
        if isinstance(error, dict):
            error = error.get("message")
        if isinstance(error, str) and error:
            return error
    return text[:500] or "no reason given"
