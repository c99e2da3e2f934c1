"""Attaching: the workers of every server open the buffers of every sender, once. See docs/explanation/live_weights.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch.distributed as dist

from tulu_mega.config import RolloutSettings
from tulu_mega.distributed.collectives import from_lead, gathered, reason
from tulu_mega.errors import UserError
from tulu_mega.weight_transfer.adapters import NAME
from tulu_mega.weight_transfer.control import ServerControl, each_server
from tulu_mega.weight_transfer.counterpart import between, differences
from tulu_mega.weight_transfer.protocol import SLOTS, Bucket
from tulu_mega.weight_transfer.sender import Sender
from tulu_mega.weight_transfer.server import ServerAddress, is_local
from tulu_mega.weight_transfer.streams import Streams, lacking
from tulu_mega.weight_transfer.streams import chosen as chosen_streams
from tulu_mega.weight_transfer.transports import Endpoint, Outbox, Transport, chosen


@dataclass(frozen=True)
class SendingEnd:
    """The buffers of a rank that sends, and its connections to the servers that attached."""

    outbox: Outbox
    mapped: bool
    """whether workers read the buffers themselves; see `Transport.mapped`"""
    controls: Mapping[str, ServerControl]
    """url -> control plane"""
    executors: Mapping[str, ThreadPoolExecutor]
    """url -> threads that send this server its buckets"""
    hasher: ThreadPoolExecutor
    """one thread that takes checksums"""
    timeout: float
    """seconds that a bucket may take"""

    def close(self) -> None:
        """Wait for what is under way, then release the buffers."""
        for executor in (*self.executors.values(), self.hasher):
            executor.shutdown(wait=True)
        for control in self.controls.values():
            control.close()
        self.outbox.close()


@dataclass(frozen=True)
class Connection:
    """A trainer's connection to the servers that take its weights; `attach` makes it, `push` uses it, every rank has one.

    A rank's part in an update lies in the data: rank 0 leads the servers, ranks with a sending end send, ranks with buckets and
    no sending end give their shards to one that sends, ranks without buckets take part in the collectives alone. A context
    manager; it closes at the end.
    """

    sender: Sender
    streams: Streams
    """what the servers are sent"""
    whole_buckets: bool
    """whether a bucket is filled as a whole, with one message a tensor rank: buckets and parameters lie on a GPU. Else tensor by
    tensor"""
    led: Mapping[str, ServerControl]
    """url -> control plane of the servers that this rank leads through an update: all on rank 0, none elsewhere"""
    sending: SendingEnd | None
    """None on ranks that send to no server"""
    lost: Mapping[str, str]
    """url -> what went wrong, of servers that never attached"""
    urls: frozenset[str]
    """all servers, on every rank"""
    lacking: set[str]
    """urls of servers that get `streams.first` before the next update, the same on every rank"""

    @property
    def adapter(self) -> str | None:
        """Return what requests name that are to be answered by the trained model; None where it is all that there is."""
        return NAME if self.streams.every.adapter else None

    def close(self) -> None:
        """Release buffers and connections; the servers stay as they are."""
        if self.sending is not None:
            self.sending.close()

    def __enter__(self) -> Connection:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def attach(sender: Sender, servers: Sequence[ServerAddress], settings: RolloutSettings) -> Connection:
    """Attach the workers of every server to this trainer's senders. Every rank calls it.

    A server that cannot attach is among the `failed` of every push.

    Raises:
        UserError: the same on every rank: a transport that cannot be, servers that were started with another
            `rollout.quantization`, have another model or version, or a rank that cannot set up its buffers.
    """
    sender.at("attaching to servers")
    timeout = settings.update_timeout
    controls = {each.url: ServerControl(each.url, each.key, timeout) for each in servers} if sender.sends else {}
    led = controls if dist.get_rank() == 0 else {}
    local = not sender.sends or all(is_local(server.url) for server in servers)
    senders = [each for each in gathered((sender.pipeline_rank, dist.get_rank(), local) if sender.sends else None) if each]
    transport = chosen(settings.transport, sender.device.type, all(near for _, _, near in senders))
    met, lost = from_lead(each_server(led.values(), _meet))
    about = {url: each.about for url, each in met.items()}
    problems = [_of_other_kind(url, each.fp8) for url, each in met.items() if each.fp8 != (settings.quantization == "fp8")]
    for url, told in about.items():
        problems += differences(url, told, sender.model, transport)
    if problems := problems or between(about):
        raise UserError(problems)
    workers = {url: each.workers for url, each in met.items()}
    streams = chosen_streams(sender, about, {stage: rank for stage, rank, _ in senders}, settings.bucket_mib)
    # rank 0 alone knows the word for the weights, and all have to send the same
    needing = set(from_lead(lacking(sender.apart, {url: each.base for url, each in met.items()}) if streams.first else []))
    sending, endpoints, problem = None, {}, None
    if sender.sends:
        try:
            buckets = [*streams.every.buckets, *(streams.first.buckets if needing else ())]
            sending, endpoints = _opened(transport, sender, buckets, controls, workers, timeout)
        except (OSError, RuntimeError) as error:
            problem = f"rank {dist.get_rank()}: the buffers for sending weights cannot be set up: {reason(error)}"
    every = [each for each in gathered((dist.get_rank(), endpoints, problem) if sender.sends else None) if each]
    if problems := [each for _, _, each in every if each]:
        raise UserError(problems)
    endpoints_of = {url: {str(rank): theirs[url] for rank, theirs, _ in every} for url in workers}
    refused = _attached(sending, [led[url] for url in workers if url in led], endpoints_of, timeout)
    lost = first_reasons(gathered({**lost, **refused}))
    urls = frozenset(each.url for each in servers)
    return Connection(sender, streams, transport.device == "cuda", led, sending, lost, urls, needing)


def first_reasons(told: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """Return url -> what went wrong, from all ranks; of several reports about a server the first."""
    reasons: dict[str, str] = {}
    for each in told:
        for url, why in each.items():
            reasons.setdefault(url, why)
    return reasons


class _Met(NamedTuple):
    """A server as it is found."""

    workers: int
    fp8: bool
    """whether their layers are FP8 blocks"""
    base: str
    """`base.identity` of the weights that all of them have; empty where they have several, or weights of nobody knows where"""
    about: dict[str, Any]
    """its description of itself"""


def _meet(control: ServerControl) -> _Met:
    workers, status = control.world_size(), control.weights_status()
    bases = {str(worker.get("base", "")) for worker in status}
    return _Met(workers, all(worker["fp8"] for worker in status), bases.pop() if len(bases) == 1 else "", control.about())


def _of_other_kind(url: str, fp8: bool) -> str:
    theirs, ours = ("fp8", "none") if fp8 else ("none", "fp8")
    return f"{url}: started with rollout.quantization = {theirs!r}, this trainer has {ours!r}; give both the same"


def _opened(
    transport: type[Transport],
    sender: Sender,
    buckets: Sequence[Bucket],
    controls: Mapping[str, ServerControl],
    workers: Mapping[str, int],
    timeout: float,
) -> tuple[SendingEnd, dict[str, Endpoint]]:
    """Make a sender's buffers and its connections to every server.

    Args:
        workers: url -> their number.

    Returns:
        the sending end; url -> what that server's workers need to attach.
    """
    outbox = transport.outbox(max(bucket.nbytes for bucket in buckets), sender.device, timeout)
    # Workers take buckets that they map in any order; a broadcast has to be the one that they wait for.
    abreast = SLOTS - 1 if transport.mapped else 1
    executors = {url: ThreadPoolExecutor(abreast, "weights") for url in workers}
    sending = SendingEnd(outbox, transport.mapped, controls, executors, ThreadPoolExecutor(1, "checksums"), timeout)
    return sending, {url: outbox.endpoint(url, count) for url, count in workers.items()}


def _attached(
    sending: SendingEnd | None, led: Sequence[ServerControl], endpoints: Mapping[str, Mapping[str, Endpoint]], timeout: float
) -> dict[str, str]:
    """Wait until the workers have attached to this sender. Rank 0 asks them to, meanwhile.

    Args:
        led: the servers that this rank tells; all on rank 0, none elsewhere.
        endpoints: url -> rank -> that sender's endpoint.

    Returns:
        url -> what went wrong.
    """

    def tell(control: ServerControl) -> None:
        control.init_weight_transfer_engine({"endpoints": endpoints[control.url], "timeout": timeout})
        control.check_workers("unattached")

    with ThreadPoolExecutor(1) as aside:
        telling = aside.submit(each_server, led, tell)
        unreached = {}
        for url in endpoints if sending is not None else ():
            try:
                sending.outbox.connect(url)
            except RuntimeError as error:
                unreached[url] = f"trainer rank {dist.get_rank()}: its workers did not attach: {reason(error)}"
        _, refused = telling.result()
    return {**refused, **unreached}
