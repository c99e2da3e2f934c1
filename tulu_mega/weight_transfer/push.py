"""Pushing: every pipeline stage streams its tensors to all servers at once, through a `Connection`.

docs/explanation/live_weights.md describes an update.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch.distributed as dist
from torch import Tensor

from tulu_mega.distributed.collectives import from_lead, gathered, reason
from tulu_mega.errors import UserError
from tulu_mega.weight_transfer.attach import Connection, SendingEnd, first_reasons
from tulu_mega.weight_transfer.control import ServerControl, each_server
from tulu_mega.weight_transfer.protocol import (
    SLOTS,
    Bucket,
    abandon_message,
    begin_message,
    bucket_message,
    checksum,
    commit_message,
    view,
)
from tulu_mega.weight_transfer.server import ServerFailure
from tulu_mega.weight_transfer.streams import Stream
from tulu_mega.weight_transfer.waiting import in_daemon_thread

_SLACK_SECONDS = 30.0
"""Seconds beyond the time-out for which a delivery is waited for: the delivery keeps the time-out itself."""


@dataclass(frozen=True)
class SyncReport:
    """The result of a push, the same on every rank."""

    version: int
    seconds: float
    streaming: float
    """seconds of these until all buckets were with all servers' workers, loaded; the rest is pausing, checking and resuming"""
    bytes: int
    """Bytes of the model as sent, counted once for any number of servers."""
    failed: dict[str, str] = field(default_factory=dict)
    """url -> what went wrong, of servers that do not serve this version; they stay paused"""

    @property
    def gigabytes_per_second(self) -> float:
        return self.bytes / self.seconds / 1e9 if self.seconds else 0.0


def push(connection: Connection, version: int, load: bool = True) -> SyncReport:
    """Send every server the current weights, or of a model with adapters that servers hold apart the adapters alone, under a
    version. Every rank calls it.

    Each server is paused, updated, has its prefix cache emptied and serves again; it generates nothing meanwhile. A server that
    fails stays paused and refuses to serve until a whole update has arrived. One that has other weights than those that the
    adapters are for gets these first.

    Args:
        load: False for a rehearsal, which `tools/bench_sync.py` times: the workers throw away what they received and hashed, and
            keep their weights and their version.

    Raises:
        UserError: the same on every rank: this trainer could not send. The servers are then as after a failure.
    """
    connection.sender.at("sending weights")
    start = time.perf_counter()
    connection.sender.settle()
    streams, failed, seconds, nbytes = connection.streams, dict(connection.lost), 0.0, 0
    needing = connection.lacking - failed.keys()
    if load and needing:
        others = dict.fromkeys(connection.urls - needing, "")
        label = f"weights that adapters {version} are for"
        told, seconds = _pass(connection, streams.first, version, load, failed | others, label, serve=False)
        failed |= {url: why for url, why in told.items() if url not in others}
        connection.lacking.difference_update(needing - failed.keys())
        nbytes = streams.first.nbytes
    failed, streaming = _pass(connection, streams.every, version, load, failed, str(version) if load else None)
    told = (time.perf_counter() - start, seconds + streaming, nbytes + streams.every.nbytes)
    return SyncReport(version, *from_lead(told), failed)


def _pass(
    connection: Connection,
    stream: Stream,
    version: int,
    load: bool,
    failed: Mapping[str, str],
    label: str | None,
    serve: bool = True,
) -> tuple[dict[str, str], float]:
    """Brings one stream to all servers but those that failed.

    Args:
        label: version that the servers' answers bear from then on; None changes nothing.
        serve: whether the servers serve again afterwards.

    Returns:
        url -> what went wrong, with those that had failed; seconds of the streaming alone. The same on every rank.
    """
    begin = begin_message(version, stream.manifest, load, stream.adapter, stream.base)
    failed = from_lead({**failed, **each_server(_left(connection.led, failed), partial(_begin, message=begin))[1]})
    checksums, problem, began = {}, None, time.perf_counter()
    try:
        checksums, mine = fill_and_send(connection, stream, version, failed)
        failed |= mine
    except Exception as error:  # whatever it is, the servers must not be left to wait and the ranks must end together
        problem = f"rank {dist.get_rank()}: its weights could not be sent: {reason(error)}"
    told = gathered((checksums, failed, problem))
    streaming = time.perf_counter() - began
    failed = first_reasons([each for _, each, _ in told])
    problems = [each for _, _, each in told if each]
    if problems:
        abandon = abandon_message("; ".join(problems))
        each_server(_left(connection.led, failed), lambda control: control.update_weights(abandon))
    else:
        commit = commit_message(version, {name: value for each, _, _ in told for name, value in each.items()})
        finish = partial(_finish, commit=commit, label=label, serve=serve)
        failed |= each_server(_left(connection.led, failed), finish)[1]
    failed = from_lead(failed)
    if problems:
        raise UserError(problems)
    return failed, streaming


def fill_and_send(
    connection: Connection, stream: Stream, version: int, lost: Mapping[str, str]
) -> tuple[dict[str, str], dict[str, str]]:
    """Fills this rank's buckets one after the other and, where it has a sending end, sends each to every server.

    A buffer is filled again once all servers have loaded what it held and its checksums are taken.

    Args:
        lost: url -> what went wrong, of servers that are sent nothing.

    Returns:
        name -> checksum of each tensor that was sent; url -> what went wrong.
    """
    sending = connection.sending
    if sending is None:
        for bucket in stream.buckets:
            for _ in _filled(connection, stream, bucket):
                pass
        return {}, {}
    failed: dict[str, str] = {}
    hashes: dict[str, Future[str]] = {}
    under_way: list[list[Future]] = [[] for _ in range(SLOTS)]
    try:
        for bucket in stream.buckets:
            _await(under_way[bucket.slot], failed)
            for name, tensor in _filled(connection, stream, bucket):
                hashes[name] = sending.hasher.submit(checksum, tensor)
            sending.outbox.filled(bucket.slot)
            urls = [control.url for control in _left(sending.controls, {**lost, **failed})]
            deliveries = [sending.executors[url].submit(_send, sending, url, version, bucket) for url in urls]
            under_way[bucket.slot] = [*deliveries, *(hashes[place.name] for place in bucket.places)]
    finally:
        for slot in under_way:
            _await(slot, failed)
    return {name: each.result() for name, each in hashes.items()}, failed


def _filled(connection: Connection, stream: Stream, bucket: Bucket) -> Iterator[tuple[str, Tensor | None]]:
    """Fill a bucket and yield its tensors as they become whole. Tensor ranks other than the first yield None for each."""
    weights, names = stream.weights, [place.name for place in bucket.places]
    wholes: list[Tensor | None] = [None] * len(names)
    if connection.sending is not None:
        buffer = connection.sending.outbox.buffer(bucket.slot)
        wholes = [view(buffer, place, stream.manifest[place.name]) for place in bucket.places]
    if connection.whole_buckets:
        weights.fill_together(names, wholes)
    for name, whole in zip(names, wholes, strict=True):
        if not connection.whole_buckets:
            weights.fill(name, whole)
        yield name, whole


def _await(futures: list[Future], failed: dict[str, str]) -> None:
    """Wait until a buffer may be filled again; note servers that failed."""
    for future in futures:
        try:
            future.result()
        except ServerFailure as failure:
            failed.setdefault(failure.url, failure.reason)
    futures.clear()


def _send(sending: SendingEnd, url: str, version: int, bucket: Bucket) -> None:
    """Sends one bucket to one server; returns when its workers have loaded it.

    Two things take time, and each has a clock of `rollout.update_timeout` seconds. The server answers over HTTP when the workers
    have loaded the bucket: this is the control plane's clock. The delivery ends when the workers have the bucket's bytes: this is
    the transport's clock.

    - Mapped buffers: the delivery comes first, and waits until the buffer is full. Then the workers are told, and read it.
    - Broadcasts: the workers join a broadcast when they are told, and answer after it, so both are under way at once. The
      delivery runs in a daemon thread, because a library may never return from it, and is given up `_SLACK_SECONDS` after its
      own clock. If the request fails first, the workers will not come, and the delivery is ended.

    Raises:
        ServerFailure: either took too long or failed.
    """
    control, message = sending.controls[url], bucket_message(version, bucket)
    if sending.mapped:
        sending.outbox.deliver(url, bucket.slot, bucket.nbytes)
        control.update_weights(message)
        return
    delivering = in_daemon_thread(partial(sending.outbox.deliver, url, bucket.slot, bucket.nbytes))
    try:
        control.update_weights(message)
        delivering.result(sending.timeout + _SLACK_SECONDS)
    except ServerFailure:
        sending.outbox.drop(url)
        raise
    except (RuntimeError, TimeoutError) as error:
        raise ServerFailure(url, f"trainer rank {dist.get_rank()} lost its workers: {reason(error)}") from None


def _left(controls: Mapping[str, ServerControl], failed: Mapping[str, str]) -> list[ServerControl]:
    """The servers that have not failed."""
    return [control for url, control in controls.items() if url not in failed]


def _begin(control: ServerControl, message: dict[str, Any]) -> None:
    control.pause()
    control.start_weight_update()
    control.update_weights(message)
    control.check_workers()


def _finish(control: ServerControl, commit: dict[str, Any], label: str | None, serve: bool) -> None:
    control.update_weights(commit)
    control.check_workers()
    control.finish_weight_update(label)
    if label is not None and (told := control.weight_info().get("weight_version")) != label:
        raise ServerFailure(control.url, f"serves weights of version {told!r} after an update to {label!r}")
    if serve:
        control.reset_prefix_cache()
        control.resume()
