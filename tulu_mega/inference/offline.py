"""vLLM on a model directory, in a process of its own.

Its memory, threads and log lines end with that process. Prompts go to it as token ids, made with the same template as in
training.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tulu_mega.bridge.families.reward import check_language_model
from tulu_mega.errors import UserError
from tulu_mega.inference.command_line import path_of
from tulu_mega.inference.interpreter import Interpreter, interpreter
from tulu_mega.inference.sampling import Sampling

if TYPE_CHECKING:
    from transformers import PretrainedConfig

DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
"""Our names of precisions to vLLM's."""
STOP_SECONDS = 20.0


@dataclass(frozen=True)
class Completion:
    """One response: its tokens, the one that ended it included, and whether one did (``stop``) or room ran out (``length``)."""

    token_ids: list[int]
    finish_reason: Literal["stop", "length"] | None
    """None: there is more to come"""


class Generator:
    """vLLM on one model, as a context manager.

    >>> with Generator("runs/sft/hf", dtype="float32") as generate:
    ...     generate([[5, 17, 3]], Sampling(max_tokens=8))
    [[Completion(token_ids=[...], finish_reason='stop')]]

    Args:
        model: model directory or hub name.
        dtype: ``float32`` or ``bfloat16``.
        tensor: tensor parallel size.
        max_model_len: longest prompt and response together; the model's own limit when None.
        seed: of the engine.
        trust_remote_code: let vLLM run Python code that comes with the model.
        python: of another environment, which is to start it; this one when None.
        log: file for vLLM's log lines; a temporary one, kept only when vLLM fails, when None.
        adapter: directory of a low-rank adapter in PEFT's format, that vLLM puts beside the model's weights.
        adapter_rank: the adapter's.

    Raises:
        UserError: vLLM cannot be had there, does not start, or fails while it generates; names the log file.
    """

    def __init__(
        self,
        model: str,
        dtype: str = "float32",
        *,
        tensor: int = 1,
        max_model_len: int | None = None,
        seed: int = 0,
        trust_remote_code: bool = False,
        python: str | None = None,
        log: Path | None = None,
        adapter: str | None = None,
        adapter_rank: int = 0,
    ):
        self._model = model
        self._arguments = {
            "model": model,
            "dtype": dtype,
            "tensor_parallel_size": tensor,
            "max_model_len": max_model_len,
            "seed": seed,
            "trust_remote_code": trust_remote_code,
            "skip_tokenizer_init": True,  # token ids in, token ids out
        }
        self._adapter = (adapter, adapter_rank) if adapter else None
        self._python = python
        self._temporary = log is None
        self._log = log

    def __enter__(self) -> Generator:
        python = check_vllm(self._python)
        for line in python.notes:
            print(line, file=sys.stderr, flush=True)
        if self._log is None:
            handle, name = tempfile.mkstemp(prefix="tulu-mega-vllm-", suffix=".log")
            os.close(handle)
            self._log = Path(name)
        self._log.parent.mkdir(parents=True, exist_ok=True)
        ours, theirs = socket.socketpair()
        self._connection = Connection(ours.detach())
        # vLLM, its own children and native libraries write to the log; Ctrl-C on the terminal is for this process alone
        with theirs, self._log.open("ab") as log:  # the child's end is the only one then, and its death is seen here
            self._process = subprocess.Popen(
                [python.path, "-m", "tulu_mega.inference.engine", str(theirs.fileno())],
                env={**os.environ, **path_of(python.path)},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=(theirs.fileno(),),
                start_new_session=True,
            )
        try:
            self._send((self._arguments, self._adapter))
            self._receive("start")
        except BaseException as error:
            self.__exit__(type(error))
            raise
        return self

    def __call__(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, numbers: Sequence[int] | None = None
    ) -> list[list[Completion]]:
        """For each prompt, in order, ``sampling.samples`` completions; see :meth:`each`."""
        answers = dict(self.each(prompts, sampling, numbers))
        return [answers[place] for place in range(len(prompts))]

    def each(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, numbers: Sequence[int] | None = None
    ) -> Iterator[tuple[int, list[Completion]]]:
        """A prompt's place and its ``sampling.samples`` completions, as soon as all of them are there.

        Args:
            prompts: token ids of each prompt.
            sampling: the same for all of them.
            numbers: each prompt's number, which with the seed gives it its random stream, so that a part of the prompts is
                answered as in the whole; their places when None.
        """
        numbers = range(len(prompts)) if numbers is None else numbers
        self._send(([list(prompt) for prompt in prompts], sampling, list(numbers), False))
        while (answer := self._receive("generate")) is not None:
            yield answer

    def stream(self, prompt: Sequence[int], sampling: Sampling) -> Iterator[Completion]:
        """One response as it comes: its next tokens each time, ``finish_reason`` None but for the last of them.

        :meth:`stop` ends it early; it is to be read to its end all the same.

        Args:
            prompt: token ids.
            sampling: of one sample.
        """
        self._send(([list(prompt)], sampling, [0], True))
        while (piece := self._receive("generate")) is not None:
            yield piece

    def stop(self) -> None:
        """Ends the response that :meth:`stream` is giving."""
        self._send(None)

    def __exit__(self, kind: type[BaseException] | None = None, *_: object) -> None:
        self._stop(at_once=kind is not None)
        if self._temporary and not (kind and issubclass(kind, UserError)):
            self._log.unlink(missing_ok=True)

    def _send(self, asked: Any) -> None:
        with contextlib.suppress(ConnectionError):  # the child is dead: `_receive` says so, with its status and log
            self._connection.send(asked)

    def _receive(self, doing: str) -> Any:
        try:
            problem, result = self._connection.recv()
        except (EOFError, ConnectionResetError):
            self._waited()
            problem, result = f"its process ended with status {self._process.returncode}", None
        if problem:
            raise UserError(f"{self._model}: vLLM could not {doing}: {problem}; its whole account is in {self._log}")
        return result

    def _stop(self, at_once: bool) -> None:
        self._connection.close()
        if not at_once:
            self._waited()
        for number in (signal.SIGTERM, signal.SIGKILL):
            if self._process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self._process.pid, number)  # with vLLM's own children
                self._waited()

    def _waited(self) -> None:
        """Waits for the child's end, though not for ever."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(STOP_SECONDS)


def check_vllm(python: str | None = None, setting: str = "python") -> Interpreter:
    """The Python that starts vLLM: see `interpreter`.

    Raises:
        UserError: there is no vLLM in it, or it cannot work.
    """
    return interpreter(python, setting)


def model_source(model: str) -> str:
    """The model directory, or the hub name as it is.

    Raises:
        UserError: a directory without a model in safetensors.
    """
    path = Path(model).expanduser()
    if not path.exists():
        return model
    if not (path / "config.json").is_file():
        raise UserError(f"{model}: not a model directory: no config.json; give a directory with config.json and *.safetensors")
    if not any(path.glob("*.safetensors")):
        raise UserError(f"{model}: not a model directory: no *.safetensors in it; export or convert the model to safetensors")
    return str(path)


def model_config(model: str, trust_remote_code: bool) -> PretrainedConfig:
    """The configuration of the model's text part.

    Raises:
        UserError: it cannot be loaded, or the model gives scores instead of text.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code)
        text = config.get_text_config()
    except Exception as error:  # OSError, ValueError, KeyError, the hub's own: whatever it is, the model cannot be used
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise UserError(f"{model}: neither a model directory nor a hub name that can be loaded: {reason}") from None
    check_language_model(model, config.architectures)
    return text


def longest_sequence(model: str, config: PretrainedConfig, asked: int | None) -> int | None:
    """Tokens of prompt and response together: as asked, or the model's own limit; None when neither says.

    Raises:
        UserError: more than the model was made for.
    """
    limit = getattr(config, "max_position_embeddings", None)
    if asked is None:
        return limit
    if limit is not None and asked > limit:
        raise UserError(f"max_model_len = {asked}, but {model} was made for {limit} tokens; use at most that")
    return asked


def check_ids(ids: list[int], longest: int | None, vocabulary: int) -> None:
    """
    Raises:
        ValueError: a prompt without tokens, with tokens the model has not, or that leaves no room for a response.
    """
    if not ids:
        raise ValueError("the prompt has no tokens")
    outside = [token for token in ids if not 0 <= token < vocabulary]
    if outside:
        raise ValueError(f"token {outside[0]} is outside the vocabulary of {vocabulary}; was it made with another tokenizer?")
    if longest is not None and len(ids) >= longest:
        raise ValueError(f"the prompt has {len(ids)} tokens, and prompt and response together may have {longest}; shorten it")
