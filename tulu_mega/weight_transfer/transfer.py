"""The sending end of weights: every pipeline stage streams its tensors to all servers at once. See docs/weights.md."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tulu_mega.config import RolloutSettings
from tulu_mega.distributed.collectives import from_lead, gathered, reason
from tulu_mega.errors import UserError
from tulu_mega.weight_transfer.control import ServerControl
from tulu_mega.weight_transfer.protocol import (
    SLOTS,
    Bucket,
    Expected,
    Manifest,
    abandon_message,
    begin_message,
    bucket_message,
    checksum,
    commit_message,
    plan_buckets,
    view,
)
from tulu_mega.weight_transfer.sender import Sender
from tulu_mega.weight_transfer.server import ServerAddress, ServerFailure
from tulu_mega.weight_transfer.transports import Outbox, aside, is_local, outbox

_SMALL_BUCKET = 16 * 2**20
_BUCKETS = 5
"""A model smaller than this many of the largest buckets has smaller ones: or else filling and loading would not overlap."""
_SLACK_SECONDS = 30.0
"""How much longer a delivery is waited for than it may take, which it sees to itself."""


@dataclass(frozen=True)
class SyncReport:
    """What became of a push, the same on every rank."""

    version: int
    seconds: float
    streaming: float
    """seconds of these until all buckets were with all servers' workers, loaded; the rest is pausing, checking and resuming"""
    bytes: int
    """of the model on its way, however many servers took it"""
    failed: dict[str, str] = field(default_factory=dict)
    """url -> what went wrong, of servers that do not serve this version; they stay paused"""

    @property
    def gigabytes_per_second(self) -> float:
        return self.bytes / self.seconds / 1e9


def stream_dtype(model: str, servers: str) -> torch.dtype:
    """What travels: no more bits than either end has.

    Args:
        model, servers: `model.dtype` and `rollout.dtype`.
    """
    return torch.bfloat16 if "bf16" in (model, servers) else torch.float32


def sender_buckets(sender: int, names: Sequence[str], manifest: Manifest, limit: int) -> list[Bucket]:
    """The buckets in which a sender's tensors travel, in their order.

    Args:
        limit: bytes (`rollout.bucket_mib`); small models have smaller buckets.
    """
    limit = min(limit, max(_SMALL_BUCKET, sum(manifest[name].nbytes for name in names) // _BUCKETS))
    return plan_buckets(sender, names, manifest, limit)


class WeightSync:
    """Connection of a trainer's ranks to servers that take its weights. Every rank has one; `connect` makes it."""

    def __init__(self, sender: Sender):
        self._sender, self.weights, self._sends = sender, sender.weights, sender.sends
        self._lead = dist.get_rank() == 0
        self._manifest: dict[str, Expected] = {}
        self._buckets: list[Bucket] = []
        self._together = False
        """whether buckets lie on a GPU, as the parameters do: then each is filled as a whole"""
        self._outbox: Outbox | None = None
        self._controls: dict[str, ServerControl] = {}
        self._lanes: dict[str, ThreadPoolExecutor] = {}
        self._hasher = ThreadPoolExecutor(1, "checksums")
        self._timeout = 0.0
        self._lost: dict[str, str] = {}
        """servers that never attached, and why"""

    @classmethod
    def connect(cls, sender: Sender, servers: Sequence[ServerAddress], settings: RolloutSettings) -> WeightSync:
        """Has every server's workers attach to this trainer's senders. Every rank calls it.

        A server that cannot attach is among the `failed` of every push.

        Raises:
            UserError: the same on every rank: a transport that cannot be, servers that were started with another
                `rollout.quantization`, or a rank that cannot set up its buffers.
        """
        made = cls(sender)
        made._attach(servers, settings, sender.pipeline_rank, sender.device)
        return made

    def push(self, version: int) -> SyncReport:
        """Gives every server the weights as they are now, under a version; every rank calls it.

        Servers are paused, updated, have their prefix cache emptied and serve again; nothing is generated meanwhile. One that
        fails stays paused and refuses to serve until it was given a whole update.

        Raises:
            UserError: the same on every rank: this trainer could not send. The servers are then as after a failure.
        """
        return self._update(version, load=True)

    def at(self, what: str) -> None:
        """This rank makes progress, and is about something new; see `watchdog.Watchdog.at`."""
        self._sender.at(what)

    def rehearse(self) -> SyncReport:
        """As `push`, but the workers throw away what they received and hashed, and keep their weights and version."""
        return self._update(0, load=False)

    def close(self) -> None:
        """Lets go of buffers and connections; the servers stay as they are."""
        for lane in (*self._lanes.values(), self._hasher):
            lane.shutdown(wait=True)
        for control in self._controls.values():
            control.close()
        if self._outbox is not None:
            self._outbox.close()
            self._outbox = None

    # Attaching

    def _attach(self, servers: Sequence[ServerAddress], settings: RolloutSettings, stage: int, device: torch.device) -> None:
        self.at("attaching to servers")
        self._timeout = timeout = settings.update_timeout
        for server in servers:
            if self._sends:
                self._controls[server.url] = ServerControl(server.url, server.key, timeout)
        local = not self._sends or all(is_local(server.url) for server in servers)
        told = gathered((stage, dist.get_rank(), local) if self._sends else None)
        kind = _transport(settings.transport, device, all(near for _, _, near in filter(None, told)))
        if self.weights is not None:
            self._plan({at: rank for at, rank, _ in filter(None, told)}, settings.bucket_mib * 2**20, kind)
        met, lost = from_lead(self._each(self._controls, _meet) if self._lead else None)
        if problems := [_of_other_kind(url, fp8) for url, (_, fp8) in met.items() if fp8 != (settings.quantization == "fp8")]:
            raise UserError(problems)
        workers = {url: count for url, (count, _) in met.items()}
        endpoints, problem = {}, None
        if self._sends:
            try:
                endpoints = self._open(kind, device, timeout, workers)
            except (OSError, RuntimeError) as error:
                problem = f"rank {dist.get_rank()}: the buffers for sending weights cannot be set up: {reason(error)}"
        every = gathered((dist.get_rank(), endpoints, problem) if self._sends else None)
        if problems := [each for _, _, each in filter(None, every) if each]:
            raise UserError(problems)

        def attach(control: ServerControl) -> None:
            each = {str(rank): mine[control.url] for rank, mine, _ in filter(None, every)}
            control.init_weight_transfer_engine({"endpoints": each, "timeout": timeout})
            _check(control, "unattached")

        with ThreadPoolExecutor(1) as aside:
            attaching = aside.submit(self._each, [self._controls[url] for url in workers], attach) if self._lead else None
            unreached = {}
            for url in workers if self._sends else ():
                try:
                    self._outbox.connect(url)
                except RuntimeError as error:
                    unreached[url] = f"trainer rank {dist.get_rank()}: its workers did not attach: {reason(error)}"
            refused = attaching.result()[1] if attaching else {}
        self._lost = _first_reasons(gathered({**lost, **refused, **unreached}))

    def _plan(self, ranks: dict[int, int], limit: int, kind: str) -> None:
        """What goes into which bucket, the same on all tensor ranks of a stage.

        Args:
            ranks: stage -> rank that sends it.
        """
        stage_of = self.weights.stage_of
        self._manifest = {
            meta.name: Expected(meta.shape, str(meta.dtype).removeprefix("torch."), ranks[stage_of[meta.name]])
            for meta in self.weights.metadata()
        }
        self._buckets = sender_buckets(dist.get_rank(), self.weights.held_names(), self._manifest, limit)
        self._together = kind in ("nccl", "ipc")

    def _open(self, kind: str, device: torch.device, timeout: float, workers: dict[str, int]) -> dict[str, dict[str, Any]]:
        """Makes this sender's buffers; url -> what that server's workers need to attach."""
        self._outbox = outbox(kind, max(bucket.nbytes for bucket in self._buckets), device, timeout)
        # Workers take buckets that they map in any order; a broadcast has to be the one that they wait for.
        abreast = SLOTS - 1 if self._outbox.mapped else 1
        self._lanes = {url: ThreadPoolExecutor(abreast, "weights") for url in workers}
        return {url: self._outbox.endpoint(url, count) for url, count in workers.items()}

    # Pushing

    def _update(self, version: int, load: bool) -> SyncReport:
        self.at("sending weights")
        start = time.perf_counter()
        self._sender.settle()
        failed = dict(self._lost)
        if self._lead:
            begin = begin_message(version, self._manifest, load)
            failed |= self._each(self._left(failed), lambda control: _begin(control, begin))[1]
        failed = from_lead(failed)
        checksums, problem, began = {}, None, time.perf_counter()
        try:
            checksums, mine = self._stream(version, failed)
            failed |= mine
        except Exception as error:  # whatever it is, the servers must not be left to wait and the ranks must end together
            problem = f"rank {dist.get_rank()}: its weights could not be sent: {reason(error)}"
        told = gathered((checksums, failed, problem))
        streaming = time.perf_counter() - began
        failed = _first_reasons([each for _, each, _ in told])
        problems = [each for _, _, each in told if each]
        if self._lead:
            if not problems:
                commit = commit_message(version, {name: value for each, _, _ in told for name, value in each.items()})
                label = str(version) if load else None
                failed |= self._each(self._left(failed), lambda control: _finish(control, commit, label))[1]
            else:
                abandon = abandon_message("; ".join(problems))
                self._each(self._left(failed), lambda control: control.update_weights(abandon))
        failed = from_lead(failed)
        if problems:
            raise UserError(problems)
        nbytes = sum(expected.nbytes for expected in self._manifest.values())
        seconds, streaming, nbytes = from_lead((time.perf_counter() - start, streaming, nbytes))
        return SyncReport(version, seconds, streaming, nbytes, failed)

    def _stream(self, version: int, lost: dict[str, str]) -> tuple[dict[str, str], dict[str, str]]:
        """Sends this stage's tensors.

        Returns:
            name -> checksum; url -> what went wrong.
        """
        if self.weights is None:
            return {}, {}
        if not self._sends:
            for bucket in self._buckets:
                for _ in self._filled(bucket):
                    pass
            return {}, {}
        failed: dict[str, str] = {}
        hashes: dict[str, Future[str]] = {}
        under_way: list[list[Future]] = [[] for _ in range(SLOTS)]
        try:
            for bucket in self._buckets:
                self._arrived(under_way[bucket.slot], failed)
                for name, tensor in self._filled(bucket):
                    hashes[name] = self._hasher.submit(checksum, tensor)
                self._outbox.filled(bucket.slot)
                left = [control.url for control in self._left(lost | failed)]
                sending = [self._lanes[url].submit(self._send, url, version, bucket) for url in left]
                under_way[bucket.slot] = [*sending, *(hashes[place.name] for place in bucket.places)]
        finally:
            for slot in under_way:
                self._arrived(slot, failed)
        return {name: each.result() for name, each in hashes.items()}, failed

    def _filled(self, bucket: Bucket) -> Iterator[tuple[str, Tensor | None]]:
        """Fills a bucket and gives its tensors as they become whole; None for each on all tensor ranks but the first."""
        names = [place.name for place in bucket.places]
        wholes: list[Tensor | None] = [None] * len(names)
        if self._sends:
            buffer = self._outbox.buffer(bucket.slot)
            wholes = [view(buffer, place, self._manifest[place.name]) for place in bucket.places]
        if self._together:
            self.weights.fill_together(names, wholes)
        for name, whole in zip(names, wholes, strict=True):
            if not self._together:
                self.weights.fill(name, whole)
            yield name, whole

    @staticmethod
    def _arrived(futures: list[Future], failed: dict[str, str]) -> None:
        """Waits until a buffer may be filled again."""
        for future in futures:
            try:
                future.result()
            except ServerFailure as failure:
                failed.setdefault(failure.url, failure.reason)
        futures.clear()

    def _send(self, url: str, version: int, bucket: Bucket) -> None:
        """One bucket to one server."""
        control, message = self._controls[url], bucket_message(version, bucket)
        if self._outbox.mapped:
            self._outbox.deliver(url, bucket.slot, bucket.nbytes)
            control.update_weights(message)
            return
        delivering = aside(partial(self._outbox.deliver, url, bucket.slot, bucket.nbytes))
        try:
            control.update_weights(message)  # answered when the workers have what is delivered meanwhile
            delivering.result(self._timeout + _SLACK_SECONDS)
        except ServerFailure:
            self._outbox.drop(url)  # what waits for its workers waits in vain
            raise
        except (RuntimeError, TimeoutError) as error:
            raise ServerFailure(url, f"trainer rank {dist.get_rank()} lost its workers: {reason(error)}") from None

    def _left(self, failed: dict[str, str]) -> list[ServerControl]:
        return [control for url, control in self._controls.items() if url not in failed]

    @staticmethod
    def _each(controls: Any, action: Callable[[ServerControl], Any]) -> tuple[dict[str, Any], dict[str, str]]:
        """Does something to several servers at once.

        Returns:
            url -> result; url -> what went wrong.
        """
        controls = list(controls.values()) if isinstance(controls, dict) else list(controls)
        results: dict[str, Any] = {}
        failed: dict[str, str] = {}
        if controls:
            with ThreadPoolExecutor(len(controls)) as pool:
                for control, future in [(control, pool.submit(action, control)) for control in controls]:
                    try:
                        results[control.url] = future.result()
                    except ServerFailure as failure:
                        failed[control.url] = failure.reason
        return results, failed


def _meet(control: ServerControl) -> tuple[int, bool]:
    """A server's workers, and whether their layers are FP8 blocks."""
    return control.world_size(), all(worker["fp8"] for worker in control.weights_status())


def _of_other_kind(url: str, fp8: bool) -> str:
    theirs, ours = ("fp8", "none") if fp8 else ("none", "fp8")
    return f"{url}: started with rollout.quantization = {theirs!r}, this trainer has {ours!r}; give both the same"


def _begin(control: ServerControl, message: dict[str, Any]) -> None:
    control.pause()
    control.start_weight_update()
    control.update_weights(message)
    _check(control)


def _finish(control: ServerControl, commit: dict[str, Any], label: str | None) -> None:
    control.update_weights(commit)
    _check(control)
    control.finish_weight_update(label)
    if label is not None and (told := control.weight_info().get("weight_version")) != label:
        raise ServerFailure(control.url, f"serves weights of version {told!r} after an update to {label!r}")
    control.reset_prefix_cache()
    control.resume()


def _check(control: ServerControl, kind: str = "problems") -> None:
    """Raises ServerFailure with what the workers found wrong."""
    problems = [problem for worker in control.weights_status() for problem in worker[kind]]
    if problems:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise ServerFailure(control.url, "; ".join(problems[:3]) + more)


def _transport(asked: str, device: torch.device, near: bool) -> str:
    """
    Raises:
        UserError: mapped memory between hosts.
    """
    if asked == "auto":
        return {("cpu", True): "shm", ("cpu", False): "gloo", ("cuda", True): "ipc", ("cuda", False): "nccl"}[device.type, near]
    if asked in ("shm", "ipc") and not near:
        raise UserError(
            f"rollout.transport = {asked} shares memory, but some servers are on other hosts than the ranks that send; "
            "use gloo, nccl or auto"
        )
    if asked in ("nccl", "ipc") and device.type != "cuda":
        raise UserError(f"rollout.transport = {asked} needs GPUs, this trainer has none; use shm, gloo or auto")
    return asked


def _first_reasons(told: Sequence[dict[str, str]]) -> dict[str, str]:
    reasons: dict[str, str] = {}
    for each in told:
        for url, why in each.items():
            reasons.setdefault(url, why)
    return reasons
