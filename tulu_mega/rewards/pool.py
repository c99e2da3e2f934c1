"""Many responses judged at once, in worker processes that may crash or hang."""

from __future__ import annotations

import json
import os
import queue
import select
import subprocess
import sys
import time
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any

from tulu_mega.errors import UserError
from tulu_mega.rewards.registry import DEFAULT_SPEC, Judge, RewardSpec
from tulu_mega.rewards.sandbox import DEFAULT_LIMITS, SLACK_S
from tulu_mega.rewards.verdict import Verdict, VerifierInput

_START_S = 120.0
_PROGRAM = ("-P", "-m", "tulu_mega.rewards.worker")


class VerifierPool:
    """Worker processes that stay warm between calls.

    A sample whose verifier raises, hangs or takes its process down gets a verdict with an ``error``; the worker is replaced
    and the other samples do not notice. Where the verifier is a built-in one, that is the reply's doing: it is asked once more,
    and then the score is 0 with its kind ("time", "crash", "memory"). The time of a sample counts from when a worker takes it
    up. Verdicts do not depend on the number of workers or on which of them judged.

    >>> with VerifierPool(names=["gsm8k"], workers=1) as pool:
    ...     [verdict.score for verdict in pool.judge([VerifierInput("It is 4.", "gsm8k", "4"), VerifierInput("", "gsm8k", "4")])]
    [1.0, 0.0]

    Workers are fresh Python interpreters, not forks: safe beside threads and CUDA, and they import no torch.

    Args:
        spec: how rows are judged.
        names: verifiers to load before the first sample (:func:`check_rows` gives them), so that loading is on no sample's time.
        workers: processes; one a core when unset.
        timeout_s: seconds a sample may take.
        memory_mb: address space of a worker.

    Raises:
        UserError: the spec names what is not there, or the time-out is shorter than what ``spec.code`` allows a program.
    """

    def __init__(
        self,
        spec: RewardSpec = DEFAULT_SPEC,
        names: Iterable[str] = (),
        workers: int | None = None,
        timeout_s: float = 30.0,
        memory_mb: int = 4096,
    ):
        judge = Judge(spec)
        names = [judge.resolve(name) for name in names]
        if "python_code" in names and timeout_s <= spec.code.total_s + SLACK_S:
            raise UserError(
                f"verifier time-out of {timeout_s} s: python_code may take {spec.code.total_s} s and {SLACK_S} s to start "
                "and end; raise the time-out or lower code.total_s"
            )
        count = workers or len(os.sched_getaffinity(0))
        if count < 1 or timeout_s <= 0:
            raise UserError(f"expected at least one worker and a positive time-out, got {workers} and {timeout_s}")
        least = max(spec.code.memory_mb, DEFAULT_LIMITS.memory_mb)  # the sandbox is tried out with the latter
        if "python_code" in names and memory_mb < least:
            raise UserError(
                f"verifier memory of {memory_mb} MiB: python_code's programs may take {least} MiB, and no more than it; "
                "raise the memory (rewards.memory_mib) or lower code.memory_mb"
            )
        setup = {"spec": spec.as_dict(), "names": names, "timeout_s": timeout_s, "memory_mb": memory_mb}
        self._workers = [_Worker(setup) for _ in range(count)]
        self._idle: queue.LifoQueue[_Worker] = queue.LifoQueue()
        self._threads = ThreadPoolExecutor(count, thread_name_prefix="verifier")
        try:
            for worker in self._workers:
                worker.start()
            for worker in self._workers:
                worker.wait_ready()
                self._idle.put(worker)
        except BaseException:
            self.close()
            raise

    def submit(self, sample: VerifierInput) -> Future[Verdict]:
        """Queues a sample. The future gives its verdict and never an exception; ``asyncio.wrap_future`` makes it awaitable."""
        return self._threads.submit(self._judge, sample)

    def judge(self, samples: Iterable[VerifierInput]) -> list[Verdict]:
        """The verdicts of the samples, in their order."""
        return [future.result() for future in [self.submit(sample) for sample in samples]]

    def close(self) -> None:
        """Drops what is queued and ends the workers."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        for worker in self._workers:
            worker.end()
        self._threads.shutdown(wait=True)
        for worker in self._workers:
            worker.stop()

    def __enter__(self) -> VerifierPool:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    def _judge(self, sample: VerifierInput) -> Verdict:
        worker = self._idle.get()
        try:
            return worker.ask(sample)
        finally:
            self._idle.put(worker)


class _Lost(Exception):
    """Raised when a worker's process ended or gave no answer in time.

    Args:
        kind: kind of the score 0 that the reply gets if it caused the loss.
    """

    def __init__(self, told: str, kind: str = "crash"):
        super().__init__(told)
        self.kind = kind


class _Blamed(Exception):
    """Raised when a worker was lost while it judged a reply that is to blame."""

    def __init__(self, lost: _Lost):
        super().__init__(str(lost))
        self.kind = lost.kind


class _Worker:
    """One process and the pipes to it. Used by one thread at a time."""

    def __init__(self, setup: dict[str, Any]):
        self._setup = setup
        self._timeout_s: float = setup["timeout_s"]
        self._process: subprocess.Popen[bytes] | None = None
        self._ready = self._closed = False
        self._heard = b""

    def start(self) -> None:
        if self._closed:
            raise _Lost("the pool is closed")
        inherited = {name: value for name, value in os.environ.items() if name != "TULU_MEGA_ROLLOUT_KEY"}
        environment = {**inherited, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, *_PROGRAM],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            env=environment,
        )
        self._ready, self._heard = False, b""
        self._send(self._setup)

    def wait_ready(self) -> None:
        """
        Raises:
            UserError: the worker found that the verifiers cannot be loaded.
            RuntimeError: the worker did not come up.
        """
        try:
            answer = self._receive(_START_S)
        except _Lost as lost:
            raise RuntimeError(f"a verifier process did not start: {lost}") from None
        if "problems" in answer:
            raise UserError(answer["problems"])
        self._ready = True

    def ask(self, sample: VerifierInput) -> Verdict:
        try:
            question = json.dumps(sample.as_dict(), allow_nan=False)
        except (TypeError, ValueError) as error:
            return Verdict.failed(f"the sample is not plain JSON: {error}")
        try:
            try:
                answer = self._answer(question)
            except _Blamed:  # once more: a machine that stood still, or somebody's signal, may have been to blame
                self.stop()
                answer = self._answer(question)
        except _Blamed as blamed:
            self.stop()
            return Verdict.failed(str(blamed)) if self._closed else Verdict.of(False, str(blamed), blamed.kind)
        except (_Lost, OSError, RuntimeError, UserError) as error:
            self.stop()
            return Verdict.failed(str(error))
        if answer["leaving"]:
            self.stop()
        return Verdict(**answer["verdict"])

    def _answer(self, question: str) -> dict[str, Any]:
        if self._process is None:
            self.start()
        if not self._ready:
            self.wait_ready()
        self._send(question)
        answer = self._receive(self._timeout_s)
        if "begun" not in answer:
            return answer
        try:
            return self._receive(self._timeout_s)
        except _Lost as lost:
            raise _Blamed(lost) from None

    def end(self) -> None:
        """Ends the process for good; an ``ask`` under way in another thread returns an error."""
        self._closed = True
        if self._process is not None:
            self._process.kill()

    def stop(self) -> None:
        """End the process and clean up; the next ``ask`` starts another process."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            process.stdin.close()
            process.stdout.close()

    def _send(self, message: dict[str, Any] | str) -> None:
        line = message if isinstance(message, str) else json.dumps(message)
        rest = memoryview(line.encode() + b"\n")
        try:
            while rest:
                rest = rest[self._process.stdin.write(rest) :]
        except BrokenPipeError:
            raise _Lost(self._ending()) from None

    def _receive(self, timeout_s: float) -> dict[str, Any]:
        """The next line of the worker."""
        end = self._process.stdout.fileno()
        deadline = time.monotonic() + timeout_s
        while b"\n" not in self._heard:
            if not _readable(end, deadline - time.monotonic()):
                raise _Lost(f"the verifier gave no verdict within {timeout_s:g} s", "time")
            chunk = os.read(end, 1 << 16)
            if not chunk:
                raise _Lost(self._ending())
            self._heard += chunk
        line, _, self._heard = self._heard.partition(b"\n")
        return json.loads(line)

    def _ending(self) -> str:
        try:
            status = self._process.wait(timeout=1)
        except subprocess.TimeoutExpired:
            return "the verifier's process closed its output"
        return f"the verifier's process ended ({f'signal {-status}' if status < 0 else f'exit status {status}'})"


def _readable(descriptor: int, timeout_s: float) -> bool:
    poll = select.poll()  # select.select refuses descriptors above 1023, which a large trainer has
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(max(timeout_s, 0) * 1000))
