"""Opening of torch's stores, in which ranks and machines meet, with errors in one line."""

from __future__ import annotations

import sys
import threading
import time
from datetime import timedelta
from typing import TYPE_CHECKING

from tulu_mega.errors import UserError

if TYPE_CHECKING:
    from torch.distributed import TCPStore

HANDSHAKE_SECONDS = 12.0
"""Seconds in which a store that listens answers; an address where nothing listens is reported after this time."""
STRANGER_SECONDS = 40.0
"""Seconds after which a listener that gives no store's answer is taken for another program."""


def opened(host: str, port: int, holds: bool, timeout: float, multi_tenant: bool = True) -> TCPStore:
    """A store at an address.

    torch waits for ever for a listener that is no store (an HTTP server). So a thread opens the store, and is left behind in that
    case.

    Args:
        holds: this process holds it; else somebody listens there.
        timeout: seconds that its user waits for values.

    Raises:
        UserError: it cannot be held here, or what listens is no store.
    """
    from torch.distributed import DistError, TCPStore

    made: list[TCPStore] = []
    failed: list[Exception] = []

    def make() -> None:
        options = dict(wait_for_workers=False, multi_tenant=multi_tenant, timeout=timedelta(seconds=timeout))
        try:
            made.append(TCPStore(host, port, is_master=holds, **options))
        except (DistError, OverflowError, ValueError) as error:
            failed.append(error)

    thread = threading.Thread(target=make, name="store", daemon=True)
    thread.start()
    began = time.monotonic()
    thread.join(HANDSHAKE_SECONDS)
    where = f"{host}, port {port}"
    if thread.is_alive():
        told = f"{time.monotonic() - began:.0f} s: {where}: what listens there does not answer as torchrun's store yet"
        print(told, file=sys.stderr, flush=True)
        thread.join(STRANGER_SECONDS - HANDSHAKE_SECONDS)
    if made:
        return made[0]
    why = (str(failed[0]).splitlines() or [type(failed[0]).__name__])[0] if failed else "no answer"
    if holds:
        raise UserError(
            f"MASTER_PORT = {port}: cannot listen there ({why}), another run may; choose another, the same on all machines"
        )
    raise UserError(
        f"{where}: what listens there does not answer as torchrun's store ({why}), another program may have the port; choose "
        "another MASTER_PORT, the same on all machines"
    )
