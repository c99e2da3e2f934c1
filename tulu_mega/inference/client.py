"""Token ids to the servers, responses back: what the trainer sees of generation. Rank 0 only."""

from __future__ import annotations

import asyncio
import json
import queue
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any

import aiohttp

from tulu_mega.config.rollout import RolloutSettings
from tulu_mega.errors import UserError
from tulu_mega.inference.reply import check_adapter, parsed, responses
from tulu_mega.inference.sampling import Sampling
from tulu_mega.outside.json_input import read_json_text
from tulu_mega.records import Response
from tulu_mega.vllm_plugin.auth import ABOUT
from tulu_mega.vllm_plugin.batch_route import ROUTE
from tulu_mega.weight_transfer.adapters import path
from tulu_mega.weight_transfer.server import ServerAddress, ServerFailure

CONNECT_SECONDS = 10.0
IDLE_SECONDS = 2.0
"""How long a connection is kept for the next request; vLLM closes them after 5."""
MAX_PROBLEMS = 10
"""Bad prompts that are told at once."""


@dataclass(eq=False)
class _Server:
    """One server during one call of `generate`."""

    address: ServerAddress
    failures: int = 0
    gone: bool = False
    """not asked again in this call"""


@dataclass(eq=False)
class _Task:
    """A prompt to be answered."""

    index: int
    prompt: list[int]
    sampling: Sampling
    number: int
    adapter: str | None
    failed_at: list[_Server] = field(default_factory=list)
    """the servers that failed it, one entry a time"""

    @property
    def request(self) -> dict[str, Any]:
        asked = {"token_ids": self.prompt, "sampling_params": self.sampling.parameters(self.number)}
        return asked if self.adapter is None else {**asked, "adapter": self.adapter}


@dataclass
class _Batch:
    """What became of the prompts that one server was asked at once."""

    server: _Server
    failed: list[_Task]
    failure: ServerFailure | None
    """the last"""


class RolloutClient:
    """Deals prompts out to servers and collects their responses.

    The same prompts, numbers and seed give the same tokens from any number of servers, and from the same number the same bits, as
    long as none fails. Connections live in a thread of their own. Close it, or use it as a context manager.

    Args:
        servers: their addresses.
        settings: of the rollouts.
        adapter: what answers, of servers that hold the trained adapters apart; None for the model itself.
    """

    def __init__(self, servers: Sequence[ServerAddress], settings: RolloutSettings, adapter: str | None = None):
        self._servers, self._settings, self._adapter = list(servers), settings, adapter
        self._longest = self._vocabulary = 0
        self._running: asyncio.Task | None = None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="rollouts", daemon=True)
        self._thread.start()
        self._session: aiohttp.ClientSession = self._on_loop(self._open()).result()

    def __enter__(self) -> RolloutClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes all connections; servers drop what is still under way on them."""
        if self._thread.is_alive():
            self._on_loop(self._cancel()).result()  # what another thread asks
            self._on_loop(self._session.close()).result()
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        version: int,
        numbers: Sequence[int] | None = None,
        done: Callable[[int, list[Response]], None] | None = None,
    ) -> list[list[Response]]:
        """
        Args:
            prompts: token ids of each prompt.
            sampling: the same for all of them.
            version: of the weights that are to answer; responses of other weights are asked for again, never returned.
            numbers: each prompt's number, which with the seed gives it its random streams; their places when None.
            done: called with a prompt's place and its responses as they come, in this thread.

        Returns:
            For each prompt, in order, ``sampling.samples`` responses.

        Raises:
            UserError: a prompt without tokens, with tokens that the model has not, or that leaves no room for a response;
                nothing has been sent then.
            ServerFailure: no server is left to ask, or a prompt failed more than `rollout.retries` times. What was under way
                is cancelled, at the servers too.
        """
        if not self._longest:
            self._on_loop(self._look()).result()
        prompts = [list(prompt) for prompt in prompts]
        self._check(prompts)
        numbers = range(len(prompts)) if numbers is None else numbers
        tasks = [
            self._task(index, prompt, sampling, number)
            for index, (prompt, number) in enumerate(zip(prompts, numbers, strict=True))
        ]
        arrived: queue.SimpleQueue[tuple[int, list[Response]] | None] = queue.SimpleQueue()
        work = self._on_loop(self._run(tasks, version, arrived.put))
        work.add_done_callback(lambda _: arrived.put(None))
        answers: dict[int, list[Response]] = {}
        try:
            while (got := arrived.get()) is not None:
                answers[got[0]] = got[1]
                if done is not None:
                    done(*got)
            work.result()
        except BaseException:
            if not work.done():
                self._on_loop(self._cancel()).result()
            raise
        return [answers[index] for index in range(len(prompts))]

    def _check(self, prompts: list[list[int]]) -> None:
        problems = []
        for index, prompt in enumerate(prompts):
            if not prompt:
                problems.append(f"prompt {index} has no tokens")
            elif outside := [token for token in prompt if not 0 <= token < self._vocabulary]:
                problems.append(
                    f"prompt {index} has token {outside[0]}, outside the vocabulary of {self._vocabulary}; was it made with "
                    "another tokenizer?"
                )
            elif len(prompt) >= self._longest:
                problems.append(
                    f"prompt {index} has {len(prompt)} tokens, and prompt and response together may have {self._longest}; "
                    "shorten it, or raise rollout.max_model_len if the model allows"
                )
            if len(problems) == MAX_PROBLEMS:
                break
        if problems:
            raise UserError(problems)

    def _task(self, index: int, prompt: list[int], sampling: Sampling, number: int) -> _Task:
        room = min(sampling.max_tokens, self._longest - len(prompt))
        return _Task(index, prompt, replace(sampling, max_tokens=room), number, self._adapter)

    def _on_loop(self, coroutine: Coroutine[Any, Any, Any]) -> Future:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    async def _open(self) -> aiohttp.ClientSession:
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=IDLE_SECONDS)
        return aiohttp.ClientSession(connector=connector, trust_env=False)

    async def _look(self) -> None:
        """What the servers say of their model, which must be the same. One that says nothing is found out when it is asked."""
        said = await asyncio.gather(*[self._about(server) for server in self._servers], return_exceptions=True)
        if unexpected := [each for each in said if isinstance(each, BaseException) and not isinstance(each, ServerFailure)]:
            raise unexpected[0]
        known = [each for each in said if isinstance(each, tuple)]
        if not known:
            raise said[0]
        sizes = sorted({vocabulary for _, vocabulary in known})
        if len(sizes) > 1:
            raise UserError(f"the servers have vocabularies of {sizes} entries; they must serve one model")
        self._longest, self._vocabulary = min(longest for longest, _ in known), sizes[0]

    async def _cancel(self) -> None:
        """Ends what is under way; the servers see closed connections and drop it too."""
        if self._running is not None:
            self._running.cancel()
            await asyncio.wait([self._running])

    async def _run(self, tasks: list[_Task], version: int, arrived: Callable[[tuple[int, list[Response]]], None]) -> None:
        """Asks until all tasks are done; those that a server failed, another one."""
        self._running = asyncio.current_task()
        servers = [_Server(address) for address in self._servers]
        asking: set[asyncio.Task[_Batch]] = set()

        def ask(tasks: list[_Task]) -> None:
            for server, part in _dealt(tasks, servers).items():
                asking.add(asyncio.create_task(self._batch(server, part, version, arrived)))

        try:
            ask(tasks)
            while asking:
                finished, _ = await asyncio.wait(asking, return_when=asyncio.FIRST_COMPLETED)
                asking -= finished
                for batch in [each.result() for each in finished]:
                    if not batch.failed:
                        continue
                    batch.server.failures += 1
                    batch.server.gone |= batch.server.failures > self._settings.retries
                    for task in batch.failed:
                        task.failed_at.append(batch.server)
                    tried = max(len(task.failed_at) for task in batch.failed)
                    if tried > self._settings.retries or all(server.gone for server in servers):
                        raise batch.failure
                    ask(batch.failed)
        finally:
            for each in asking:
                each.cancel()
            await asyncio.gather(*asking, return_exceptions=True)

    async def _batch(
        self, server: _Server, tasks: list[_Task], version: int, arrived: Callable[[tuple[int, list[Response]]], None]
    ) -> _Batch:
        """Asks a server for the responses to some prompts and passes on those that are as they should be."""
        left = dict(enumerate(tasks))
        failed: list[_Task] = []
        failure = None
        url = server.address.url
        body = json.dumps({"prompts": [task.request for task in tasks]}, separators=(",", ":")).encode()
        try:
            async for line in self._lines(server.address, body):
                try:
                    answer = parsed(line)
                    place = answer.get("place")
                    if type(place) is not int or place not in left:
                        raise ValueError(f"an answer to prompt {place!r}, of which none is expected")
                    task = left.pop(place)
                except ValueError as problem:
                    raise ServerFailure(url, f"POST {ROUTE}: a malformed reply: {problem}") from None
                try:
                    check_adapter(answer, None if task.adapter is None else path(version))
                    made = responses(answer, task.prompt, task.sampling, version, self._vocabulary)
                except ValueError as problem:
                    failed.append(task)
                    failure = ServerFailure(url, f"POST {ROUTE}: a malformed reply: {problem}")
                else:
                    arrived((task.index, made))
            if left:
                failure = ServerFailure(url, f"POST {ROUTE}: it ended with {len(left)} of {len(tasks)} prompts unanswered")
        except ServerFailure as error:
            failure = error
            # one that nobody listens at comes again at another address, if at all; one that hangs is not waited for twice
            server.gone |= isinstance(error.__cause__, aiohttp.ClientConnectorError | TimeoutError)
        return _Batch(server, [*failed, *left.values()], failure)

    async def _lines(self, address: ServerAddress, body: bytes) -> AsyncIterator[bytes]:
        """The lines of a batch's answer; each may take `rollout.request_timeout`."""
        seconds, what = self._settings.request_timeout, f"POST {ROUTE}"
        patience = aiohttp.ClientTimeout(total=None, sock_connect=min(CONNECT_SECONDS, seconds), sock_read=seconds)
        try:
            async with self._session.post(
                address.url + ROUTE, data=body, headers=_headers(address), timeout=patience
            ) as response:
                if response.status != 200:
                    text = (await response.text())[:500]
                    raise ServerFailure(address.url, f"{what}: status {response.status}: {text}")
                part: list[bytes] = []
                async for piece in response.content.iter_any():
                    *whole, rest = piece.split(b"\n")
                    for end in whole:
                        yield b"".join([*part, end])
                        part = []
                    part.append(rest)
                if any(part):
                    raise ServerFailure(address.url, f"{what}: it ended within a line: {b''.join(part)[:100]!r}")
        except TimeoutError as error:
            raise ServerFailure(address.url, f"{what}: no answer within {seconds:g} s") from error
        except aiohttp.ClientError as error:
            raise ServerFailure(address.url, f"{what}: {str(error) or type(error).__name__}") from error

    async def _about(self, address: ServerAddress) -> tuple[int, int]:
        """The longest sequence and the vocabulary of a server's model."""
        patience = aiohttp.ClientTimeout(total=CONNECT_SECONDS)
        try:
            async with self._session.get(address.url + ABOUT, headers=_headers(address), timeout=patience) as response:
                text = await response.text()
                about = read_json_text(text)
                return int(about["longest"]), int(about["vocabulary"])
        except TimeoutError:
            raise ServerFailure(address.url, f"GET {ABOUT}: no answer within {CONNECT_SECONDS:g} s") from None
        except aiohttp.ClientError as error:
            raise ServerFailure(address.url, f"GET {ABOUT}: {str(error) or type(error).__name__}") from None
        except (ValueError, KeyError, TypeError):
            raise ServerFailure(address.url, f"GET {ABOUT}: status {response.status}: {text[:200]!r}") from None


def _dealt(tasks: list[_Task], servers: list[_Server]) -> dict[_Server, list[_Task]]:
    """Which server is asked which tasks: in turn, each one of those that have failed it least."""
    parts: dict[_Server, list[_Task]] = {}
    for turn, task in enumerate(tasks):
        left = [server for server in servers if not server.gone]
        fewest = min(task.failed_at.count(server) for server in left)
        left = [server for server in left if task.failed_at.count(server) == fewest]
        parts.setdefault(left[turn % len(left)], []).append(task)
    return parts


def _headers(address: ServerAddress) -> dict[str, str]:
    key = {"Authorization": f"Bearer {address.key}"} if address.key else {}
    return {"Content-Type": "application/json", **key}
