"""``python -m tulu_mega.agent TORCHRUN_ARGUMENTS -m tulu_mega COMMAND ...``: torchrun, with an end that tells.

It hands SIGTERM and SIGUSR1 on to the ranks, which save then, and leaves them time for it (``--shutdown-timeout``). Exit status:
0 done · 143 asked to end · otherwise that of the rank that failed first, as `tulu-mega` alone has it: 2 the user can mend it.

Ranks that are started again meet in a store of their own. torchrun would hand them the one it shares with all ranks, which still
holds where the ranks before them listened (pytorch's issues 135712 and 167288).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from tulu_mega.errors import Stopped
from tulu_mega.launcher import ASKS

_HANDLED = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"


def main(arguments: Sequence[str]) -> int:
    """Runs torchrun with arguments of its own; later ones win over ours. Returns the exit status."""
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    from tulu_mega.platforms.caches import memcpy_environment

    os.environ.update(memcpy_environment())
    try:
        run.run(run.parse_args(["--signals-to-handle", _HANDLED, "--shutdown-timeout", "120", *arguments]))
    except SignalException as asked:
        return Stopped.status if asked.sigval in ASKS else 128 + asked.sigval
    except ChildFailedError as failed:
        rank, failure = failed.get_first_failure()
        print(f"error: rank {rank} failed with exit status {failure.exitcode}: {failure.message}", file=sys.stderr, flush=True)
        return failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
