"""The agents of a run's machines gather before torchrun's rendezvous, which waits without a word for machines that do not come.

They gather in the store that torchrun uses afterwards, which the first machine holds on MASTER_PORT. Each agent registers there,
and reads the number of machines and the name of the run.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import time
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

from tulu_mega.errors import UserError
from tulu_mega.launch import stores
from tulu_mega.launch.route import resolved

if TYPE_CHECKING:
    from torch.distributed import Store

PATIENCE = 600.0
"""Seconds to wait for machines, the same as in torchrun's own rendezvous."""
WORD_SECONDS = 10.0
_PREFIX = "tulu_mega/agents"


@dataclass(frozen=True)
class Place:
    """The address where the agents of a run gather, and the run's name."""

    master: str
    port: int
    run_id: str
    nodes: int
    host: bool
    """whether this agent's machine has that address"""


def gathered(place: Place) -> Store:
    """Wait until all machines have come, and print now and then which have. Keep the returned store as long as torchrun needs it.

    Raises:
        UserError: the port is taken or cannot be reached here, another run gathers there or one of another size, or some
            machines do not come.
    """
    from torch.distributed import DistError

    if place.host:
        check_port(place)
    else:
        _await_host(place)
    store = stores.opened(place.master, place.port, place.host, stores.HANDSHAKE_SECONDS)
    try:
        _compare(store, place)
        store.set_timeout(timedelta(seconds=60))
        _await_all(store, place)
    except DistError as error:
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{_where(place)}: the machines lost each other ({why}); see the first one's log") from None
    return store


def check_port(place: Place) -> None:
    """Check that the other machines will find this one at the address and port that they were given."""
    addresses = resolved(place.master, place.port, "MASTER_ADDR")
    family = socket.AF_INET6 if ":" in addresses[0] else socket.AF_INET
    try:
        listener = socket.create_server(("", place.port), family=family)
    except (OSError, OverflowError) as error:
        why = os.strerror(error.errno) if isinstance(error, OSError) else "ports go up to 65535"
        raise UserError(
            f"MASTER_PORT = {place.port}: cannot listen there ({why}), another run may; choose another, the same on all machines"
        ) from None
    with listener:
        try:
            socket.create_connection((addresses[0], place.port), timeout=5).close()
        except OSError as error:
            raise UserError(
                f"MASTER_ADDR = {place.master} ({addresses[0]}) does not lead to this machine, which has NODE_RANK 0 "
                f"({error.strerror or error}); give its own address, on all machines"
            ) from None


def _await_host(place: Place) -> None:
    """Wait until the first machine listens."""
    began = said = time.monotonic()
    while True:
        try:
            address = resolved(place.master, place.port, "MASTER_ADDR")[0]
            socket.create_connection((address, place.port), timeout=5).close()
            return
        except OSError as error:
            why = error.strerror or str(error)
        now = time.monotonic()
        told = f"{_where(place)}: the first machine does not answer there ({why})"
        if now - began > PATIENCE:
            raise UserError(f"{told}; start NODE_RANK 0, or check the addresses and ports between the machines")
        if now - said >= WORD_SECONDS:
            said = now
            print(f"{now - began:.0f} s: {told} yet", file=sys.stderr, flush=True)
        time.sleep(0.2)


def _compare(store: Store, place: Place) -> None:
    """Compare this machine's view of the run with the first machine's."""
    from torch.distributed import DistStoreError

    mine = {"RUN_ID": place.run_id, "NNODES": place.nodes}
    key = f"{_PREFIX}/run"
    if place.host:
        store.set(key, json.dumps(mine))
        return
    try:
        theirs = json.loads(store.get(key))
    except DistStoreError:  # the first machine writes it as soon as there is a store
        raise UserError(
            f"{_where(place)}: the store that listens there belongs to another torchrun, not to this program; choose another "
            "MASTER_PORT, the same on all machines"
        ) from None
    if odd := [f"{name} is {mine[name]!r} here, {theirs[name]!r} there" for name in mine if mine[name] != theirs[name]]:
        store.set(f"{_PREFIX}/odd", f"{socket.gethostname()}: {'; '.join(odd)}")
        raise UserError(f"{_where(place)}: {'; '.join(odd)}; give all machines of a run the same")


def _await_all(store: Store, place: Place) -> None:
    number = store.add(f"{_PREFIX}/come", 1)  # one that comes again counts again, and then nobody is missing
    store.set(f"{_PREFIX}/name/{number}", f"{socket.gethostname()} ({os.getpid()})")
    if number > place.nodes:
        print(
            f"{_where(place)}: all {place.nodes} machines had come already; this one replaces one that left. If this machine "
            "belongs to another run, end it and give that run another MASTER_PORT",
            file=sys.stderr,
            flush=True,
        )
    began = said = time.monotonic()
    while (come := store.add(f"{_PREFIX}/come", 0)) < place.nodes:
        if store.check([f"{_PREFIX}/odd"]):
            odd = store.get(f"{_PREFIX}/odd").decode()
            time.sleep(2 * place.host)  # the others read it in the first one's store
            raise UserError(f"{_where(place)}: {odd} on this one; give all machines of a run the same")
        now = time.monotonic()
        names = []
        with contextlib.suppress(ValueError):
            names = [store.get(f"{_PREFIX}/name/{each}").decode() for each in range(1, come + 1)]
        told = f"{_where(place)}: {come} of {place.nodes} machines have come: {', '.join(names[:8])}"
        if now - began > PATIENCE:
            raise UserError(f"{told}; start the others, or give NNODES their number")
        if now - said >= WORD_SECONDS:
            said = now
            print(f"{now - began:.0f} s: {told}", file=sys.stderr, flush=True)
        time.sleep(0.2)


def _where(place: Place) -> str:
    return f"{place.master}, port {place.port}"
