"""Worlds of ranks: joins the one torchrun made, or starts one on this machine.

A rank is this program itself with the same arguments; what torchrun's environment variables (RANK, WORLD_SIZE,
MASTER_ADDR, ...) say decides which of the two a process is. A world started here rendezvouses over a store on the
loopback interface that the launcher holds and dies with its launcher however that dies. Commands that generate while they train
have vLLM servers beside the world, which outlive it: where `restarts` is set, a world that fails is started again and finds
them as they were.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from tulu_mega.errors import UserError
from tulu_mega.launch import meeting, route, sameness
from tulu_mega.launch.ranks import start_world
from tulu_mega.launch.reporting import AGENT_PID, LAUNCHER_PID, started_by_launcher
from tulu_mega.process import uncollected

if TYPE_CHECKING:
    from tulu_mega.config import EngineSettings, ParallelSettings


ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
"""Environment variables of CUDA's allocator, the newer name first; servers do not get it (`inference.command_line`)."""
EXPANDABLE = "expandable_segments:True"
_TORCHRUN = "TORCHELASTIC_RUN_ID"


@dataclass(frozen=True)
class World:
    """This process's place among the ranks."""

    rank: int
    size: int
    local_rank: int
    """rank among the processes of this machine: the index of its GPU"""
    local_size: int
    data_parallel: int
    """DP: size / (TP x PP x CP)"""


class Companions(AbstractContextManager["Companions"], Protocol):
    """Servers beside the ranks. They run while the context is open, and keep running when the ranks are started again."""

    for_ranks: Mapping[str, str]
    """environment variables by which the ranks find them"""
    shared: bool
    """whether they share a GPU with one another or with the ranks"""

    def wait(self) -> None:
        """Wait until all servers answer requests."""


def run(
    target: str,
    settings: EngineSettings,
    program: Sequence[str],
    prepare: Callable[[Any], None],
    *,
    run_dir: str | None = None,
    grace: float = 10.0,
    restarts: int = 0,
    companions: Callable[[Any, int], Companions | None] | None = None,
) -> int:
    """Calls ``target(settings, world)`` on every rank of a world.

    Args:
        target: ``module:function``.
        settings: the command's settings.
        program: the command line of a rank, which is to come here again, as a rank.
        prepare: checks the settings and makes what the ranks will read; called once, before they start.
        run_dir: its directory ``logs`` gets what the ranks print; a temporary one when None.
        grace: seconds that ranks which are asked to end have to do so.
        restarts: times that a world which fails is started again.
        companions: makes what is to be around the ranks, of the settings and the number of ranks; None where nothing is to be.

    Returns:
        The exit status: 0, or that of the rank that failed first (128 + n where signal n ended it).

    Raises:
        UserError: when the layout does not fit the world or the machine, or packages are installed that cannot work; whatever
            `prepare` raises.
    """
    for name, value in settings.precision.environment.items():  # read when libraries are imported, which no rank has done yet
        os.environ.setdefault(name, value)
    if {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= os.environ.keys():
        _usual_environment()
        return _rank(target, settings, prepare, run_dir)
    size = settings.parallel.model_parallel * (settings.parallel.data or 1)
    _check_devices(settings.parallel, size)
    prepare(settings)
    with contextlib.ExitStack() as stack:
        environ: Mapping[str, str] = {}
        if companions and (made := companions(settings, size)):
            servers = stack.enter_context(made)
            environ = servers.for_ranks  # they start while the ranks do
            if servers.shared:  # or before: vLLM wants others on its GPU to hold still while it measures their memory
                servers.wait()
        return start_world(size, run_dir, list(program), environ, 1 + restarts, grace)


def _rank(target: str, settings: EngineSettings, prepare: Callable[[Any], None], run_dir: str | None) -> int:
    """Run a rank whose world exists: compare the nodes, have the first rank prepare, call the target."""
    with meeting.refusing_together(os.environ):
        world = joined_world(settings.parallel, os.environ)
    with meeting.met(os.environ) as nodes:
        nodes.agree(lambda: sameness.of_program() | sameness.of_settings(settings), run_dir)
        if not started_by_launcher():  # which has done so
            nodes.lead(lambda: prepare(settings))
        resolve("tulu_mega.platforms:prepare_imports")()
        return int(resolve(target)(settings, world) or 0)


def _usual_environment() -> None:
    """Set environment variables that a rank needs unless they are set already; libraries read them when they are first used.

    gloo otherwise asks what the host name resolves to, on Debian the loopback; CUDA's allocator falls apart where every step has
    other lengths.
    """
    if "GLOO_SOCKET_IFNAME" not in os.environ:
        address = os.environ["MASTER_ADDR"]
        port = os.environ.get("MASTER_PORT", "")
        with contextlib.suppress(UserError):  # where the ranks meet it is told
            if name := route.interface(route.own_address(address, int(port) if port.isdigit() else 9)):
                os.environ["GLOO_SOCKET_IFNAME"] = name
    if not any(name in os.environ for name in ALLOCATOR) and resolve("torch:cuda").is_available():
        os.environ[ALLOCATOR[0]] = EXPANDABLE


def joined_world(parallel: ParallelSettings, env: Mapping[str, str]) -> World:
    """The world that torchrun's environment variables describe.

    Raises:
        UserError: when they are incomplete, or the layout does not divide or match the world.
    """
    names = ["RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"]
    if missing := [name for name in names if name not in env]:
        raise UserError(f"RANK and MASTER_ADDR are set, but not {', '.join(missing)}; start the ranks with torchrun")
    try:
        rank, size, local_rank, local_size = (int(env[name]) for name in names)
    except ValueError:
        got = ", ".join(f"{name}={env[name]!r}" for name in names)
        raise UserError(f"expected integers in {got}; start the ranks with torchrun") from None
    return World(rank, size, local_rank, local_size, parallel.replicas(size))


def resolve(target: str) -> Any:
    """The object that ``module:attribute`` names.

    Raises:
        UserError: when a package that the module needs is not installed.
    """
    module, _, attribute = target.partition(":")
    try:
        with uncollected():
            return getattr(importlib.import_module(module), attribute)
    except ModuleNotFoundError as error:
        missing = (error.name or "").split(".")[0]
        if missing == "tulu_mega":
            raise
        raise UserError(
            f"the package {missing!r} is not installed in {sys.executable}; install tulu-mega with its 'cpu' or 'gpu' extra"
        ) from error
    except ImportError as error:  # a package is there, and of a release that others do not go with
        from tulu_mega.platforms import releases

        releases.refuse(*releases.PARTS)
        raise error


def die_with_launcher() -> None:
    """In a rank that `run` or torchrun started: has the kernel kill it when that process is gone, since nobody would end it with
    the others, or start it again. Elsewhere nothing.

    Linux only; on other systems ranks end with the launcher when it ends in an orderly way.
    """
    starter = next((os.environ[name] for name in (LAUNCHER_PID, AGENT_PID) if name in os.environ), None)
    if (starter is None and _TORCHRUN not in os.environ) or not sys.platform.startswith("linux"):
        return
    pr_set_pdeathsig = 1
    ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, signal.SIGKILL)
    if starter not in (None, str(os.getppid())):  # it died before the kernel was told
        os._exit(1)


def _check_devices(parallel: ParallelSettings, size: int) -> None:
    import torch

    if torch.cuda.is_available() and size > torch.cuda.device_count():
        raise UserError(
            f"parallel: the layout takes {size} processes (tensor {parallel.tensor} x pipeline {parallel.pipeline} x context "
            f"{parallel.context} x data {parallel.data or 1}), but this machine has {torch.cuda.device_count()} GPU(s); "
            "use a smaller layout, or torchrun over several machines"
        )
