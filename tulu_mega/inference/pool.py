"""vLLM servers, owned by the launcher: started, watched, ended and started again; the ranks only attach."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import httpx
import psutil

from tulu_mega.errors import UserError
from tulu_mega.inference import keeper
from tulu_mega.inference.addresses import FOLDER, ServerRecord, restart_asked, write_record
from tulu_mega.inference.command_line import ServerOptions, command, environment
from tulu_mega.launch.run_dir import make_private
from tulu_mega.launch.run_files import FULL
from tulu_mega.vllm_plugin.auth import ABOUT, ASKED, KEY
from tulu_mega.weight_transfer.server import ServerAddress

PERIOD_SECONDS = 0.1
"""Seconds between looks at the servers."""
HEALTH_PERIOD_SECONDS = 5.0
HEALTH_SECONDS = 10.0
"""Seconds for a server to answer a health check."""
LOG_BYTES = 64 << 20
"""Most bytes of a server's log; the part before it is kept too."""
SICK = 3
"""Failed health checks in a row after which a server counts as stuck."""
TAIL_LINES = 20
END_SECONDS = keeper.GRACE_SECONDS * 3 + keeper.TRACKER_SECONDS + 5.0


class ServerPool:
    """N vLLM servers on this machine, as a context manager. Entering starts them and returns at once.

    A thread watches: a server that died, that does not answer, or that a rank asks to have restarted is ended with all its
    processes and started again, at most `restarts` times. What is the case is written to DIRECTORY/servers for the ranks.

    Each server has a keeper between it and this process (see `rollout.keeper`): however this process ends, they all do.

    Args:
        options: what they have in common.
        directory: of the run; gets servers/ and logs/.
        servers: how many.
        start_timeout: seconds that one may take to start.
        restarts: times that each is started again.
        ports: of each; the kernel chooses when None.
        key: without it no route answers; a random one when None.
        cores: of each server, the cores of each of its workers; None on GPUs.
        devices: of each server, its GPUs; all of them when None. Servers with one in common start one after the other, since vLLM
            measures what is free of a GPU's memory while it starts and ends where others change that.
        shared: whether others than one server use a GPU. A server whose start fails is then tried again: it may have met them.

    Raises:
        UserError: a port is taken, the directory cannot be written.
    """

    def __init__(
        self,
        options: ServerOptions,
        directory: Path,
        servers: int = 1,
        *,
        start_timeout: float = 600.0,
        restarts: int = 3,
        ports: list[int] | None = None,
        key: str | None = None,
        cores: list[list[list[int]]] | None = None,
        devices: list[list[int]] | None = None,
        shared: bool = False,
    ):
        self.shared = shared
        self.key = key or secrets.token_urlsafe(32)
        self._folder = Path(directory, FOLDER)
        self._logs = Path(directory, "logs")
        self._start_timeout, self._restarts = start_timeout, restarts
        self._servers = [
            _Server(
                number,
                options,
                self.key,
                self._logs / f"server_{number}.log",
                ports[number] if ports else 0,
                cores[number] if cores else None,
                devices[number] if devices else None,
            )
            for number in range(servers)
        ]
        self._done = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="servers", daemon=True)

    def __enter__(self) -> ServerPool:
        try:
            shutil.rmtree(self._folder, ignore_errors=True)  # of a run before
            make_private(self._folder.parent)
            self._folder.mkdir()
            self._logs.mkdir(exist_ok=True)
        except OSError as error:
            raise UserError(f"{self._folder} cannot be made: {error.strerror}; choose a directory you may write") from None
        for server in self._servers:
            for log in (server.log, server.older_log):
                log.unlink(missing_ok=True)
            self._say(server, "starting")
        self._watcher.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._watcher.join()
        shutil.rmtree(self._folder, ignore_errors=True)

    @property
    def for_ranks(self) -> dict[str, str]:
        """Return the environment variables by which `addresses.attached` finds the servers in the ranks."""
        return {KEY: self.key}

    def wait(self, asked: threading.Event | None = None) -> list[ServerAddress]:
        """Wait until all servers are ready and return them; an empty list when `asked` is set before.

        Raises:
            UserError: one could not be started, with the tail of its log.
        """
        while not self._settled() and not (asked and asked.wait(PERIOD_SECONDS)):
            time.sleep(0 if asked else PERIOD_SECONDS)
        self._raise_failure()
        if not self._settled():
            return []
        return [ServerAddress(server.url, self.key, server.incarnation) for server in self._servers]

    def watch_until(self, asked: threading.Event) -> None:
        """Watch the servers until `asked` is set.

        Raises:
            UserError: a server failed for good, with the tail of its log.
        """
        while not asked.wait(PERIOD_SECONDS):
            self._raise_failure()

    def _raise_failure(self) -> None:
        for server in self._servers:
            if server.state == "failed":
                raise UserError(server.why)

    def _settled(self) -> bool:
        states = [server.state for server in self._servers]
        return "failed" in states or set(states) == {"ready"}

    def _watch(self) -> None:
        """Start and watch the servers. One thread starts all processes: the kernel's signal of a parent's death concerns the
        starting thread."""
        try:
            while not self._done.wait(PERIOD_SECONDS):
                for server in self._servers:
                    self._look_after(server)
                    server.limit_log()
        except OSError as error:  # nobody would look after the servers any more, and nobody would know
            for server in self._servers:
                server.state, server.why = "failed", f"vLLM servers in {self._folder.parent} cannot be watched any more: {error}"
                with contextlib.suppress(OSError):
                    self._say(server, "failed")
        finally:
            for server in self._servers:
                server.end(at_once=False, wait=False)
            for server in self._servers:
                server.end(at_once=False)

    def _look_after(self, server: _Server) -> None:
        if server.state == "starting":
            if server.process is None:
                if not any(other.starts_beside(server) for other in self._servers):
                    server.start()
                    self._say(server, "starting")
            elif (code := server.process.poll()) is not None:
                # killed, it may come up the next time; what it could not do itself it will not
                hopeless = code <= 128 and code != ASKED and not self.shared
                self._again(server, f"ended with status {code} while it started", hopeless)
            elif server.answers():
                self._say(server, "ready")
            elif time.monotonic() > server.started + self._start_timeout:
                self._again(server, f"was not ready after {self._start_timeout:g} s", hopeless=True)
        elif server.state == "ready":
            if (code := server.process.poll()) is not None:
                self._again(server, "ended as a trainer asked it to" if code == ASKED else f"ended with status {code}")
            elif (why := restart_asked(self._folder, server.url, server.incarnation)) is not None:
                self._again(server, f"was to be started again: {why}")
            elif server.stuck():
                self._again(server, f"did not answer /health {SICK} times in a row")

    def _again(self, server: _Server, why: str, hopeless: bool = False) -> None:
        """End the rest of a server and queue a restart, if any are left."""
        server.end(at_once=True)
        if hopeless or server.restarts == self._restarts:
            lines = server.tail() or ["(nothing)"]
            after = f" after {server.restarts} restart(s)" if server.restarts else ""
            first = f"vLLM server {server.number} {why}{after}; the end of its log ({server.log}):"
            server.why = "\n".join([first, *(f"  {line}" for line in lines)])
            self._say(server, "failed")
            return
        server.restarts += 1
        tried = f"{server.restarts} of {self._restarts} times"
        print(f"vLLM server {server.number} {why}; it is started again ({tried}), log {server.log}", file=sys.stderr, flush=True)
        self._say(server, "starting")

    def _say(self, server: _Server, state: str) -> None:
        server.state = state
        pid = server.process.pid if server.process else 0
        write_record(self._folder, server.number, ServerRecord(state, server.url, pid, server.incarnation, server.why))


class _Server:
    """One server, over all its incarnations."""

    def __init__(
        self,
        number: int,
        options: ServerOptions,
        key: str,
        log: Path,
        port: int,
        cores: list[list[int]] | None,
        devices: list[int] | None,
    ):
        self.number, self.log, self.older_log = number, log, log.with_suffix(".log.1")
        self.state, self.why, self.url = "starting", "", ""
        self.incarnation = self.restarts = 0
        self.started = 0.0
        self.process: subprocess.Popen | None = None
        """its keeper, which leads its session"""
        self._options, self._key, self._port, self._cores, self._devices = options, key, port, cores, devices
        self._looked = 0.0
        self._sick = 0
        self._client: httpx.Client | None = None

    def start(self) -> None:
        """Start a new incarnation; return at once."""
        self.incarnation = max(self.incarnation + 1, time.time_ns() // 1_000_000)  # larger than any of a launcher before
        scratch = Path(tempfile.mkdtemp(prefix="tulu_mega_"))
        words = [sys.executable, "-I", "-S", keeper.__file__, str(scratch)]
        words += command(self._options, self._port, on_cpu=self._cores is not None)
        environ = environment(self._options, self._key, self.incarnation, scratch, self._cores, self._devices)
        self.log.parent.mkdir(parents=True, exist_ok=True)  # somebody may have removed it meanwhile
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                words, env=environ, stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
        self.started, self._sick = time.monotonic(), 0

    def starts_beside(self, other: _Server) -> bool:
        """Return whether this server is starting on a GPU that it shares with another one."""
        common = set(self._devices or ()) & set(other._devices or ())
        return bool(common) and self is not other and self.process is not None and self.state == "starting"

    def answers(self) -> bool:
        """Return whether the server is ready, from a check now and then; its URL is known from then on."""
        if not self._due(HEALTH_PERIOD_SECONDS / 20):
            return False
        port = self._listening()
        if port is None:
            return False
        self.url = f"http://{_reachable(self._options.host)}:{port}"
        self._client = httpx.Client(
            base_url=self.url, headers={"Authorization": f"Bearer {self._key}"}, timeout=HEALTH_SECONDS, trust_env=False
        )
        return self._well()

    def stuck(self) -> bool:
        """Return whether several health checks in a row failed; a check is made now and then."""
        if self._due(HEALTH_PERIOD_SECONDS):
            self._sick = 0 if self._well() else self._sick + 1
        return self._sick >= SICK

    def end(self, at_once: bool, wait: bool = True) -> None:
        """End all processes of the server: ask it to end, or kill it.

        Args:
            wait: until they are gone.
        """
        if self.process is None:
            return
        with contextlib.suppress(OSError):
            if at_once and not self.process.stdin.closed:
                self.process.stdin.write(b"k")
            self.process.stdin.close()
        if not wait:
            return
        try:
            self.process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        _kill_session(self.process.pid)  # where somebody has killed the keeper
        if self._client is not None:
            self._client.close()
        self.process = self._client = None
        self.url = ""

    def limit_log(self) -> None:
        """Move the latest part of a log that is too long to a second file, and empty the first."""
        try:
            if self.log.stat().st_size > LOG_BYTES:
                shutil.copyfile(self.log, self.older_log)
                os.truncate(self.log, 0)  # whoever writes to it appends
        except FileNotFoundError:
            return
        except OSError as error:
            if error.errno not in FULL:  # no room to keep the older part: the servers matter more
                raise

    def tail(self) -> list[str]:
        """The last lines of its log."""
        return self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-TAIL_LINES:] if self.log.exists() else []

    def _due(self, period: float) -> bool:
        now = time.monotonic()
        if now < self._looked + period:
            return False
        self._looked = now
        return True

    def _listening(self) -> int | None:
        """Return the port on which the server itself listens; None before it does."""
        try:
            (child,) = psutil.Process(self.process.pid).children()
            sockets = child.net_connections("tcp")
        except (psutil.Error, ValueError):
            return None
        ports = {each.laddr.port for each in sockets if each.status == psutil.CONN_LISTEN}
        return self._port if self._port in ports else next(iter(ports), None) if self._port == 0 else None

    def _well(self) -> bool:
        try:
            return self._client.get("/health").status_code == 200 and self._client.get(ABOUT).status_code == 200
        except httpx.HTTPError:
            return False


def _reachable(host: str) -> str:
    """A name for a host that a server binds to."""
    return "127.0.0.1" if host in ("0.0.0.0", "::", "") else f"[{host}]" if ":" in host else host


def _kill_session(leader: int) -> None:
    for process in psutil.process_iter():
        with contextlib.suppress(OSError, psutil.Error):
            if os.getsid(process.pid) == leader:
                process.kill()
