"""A conversation with a model on the terminal: its words as they come, and a few commands."""

from __future__ import annotations

import contextlib
import re
import signal
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from tokenizers.decoders import DecodeStream

from tulu_mega.data.messages import Messages
from tulu_mega.data.stops import answer_text
from tulu_mega.errors import nearest, printable
from tulu_mega.inference.offline import Completion, Generator
from tulu_mega.inference.sampling import Sampling

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

COMMANDS = {
    "/help": "lists these commands",
    "/reset": "begins a new conversation",
    "/system TEXT": "begins a new conversation under another system message; without a text, under none",
    "/exit": "ends; so do /quit, /bye and Ctrl-D",
}
_ENDS = ("/exit", "/quit", "/bye")
_RESETS = ("/reset", "/clear", "/new")
_HELPS = ("/help", "/?")
_COMMAND = re.compile(r"/(\?|[A-Za-z]+)(?=\s|$)")
"""Pattern of a command; a path at the beginning of a message does not match."""


def converse(
    generator: Generator,
    tokenizer: PreTrainedTokenizerFast,
    sampling: Sampling,
    system: str | None,
    prompt_of: Callable[[Messages], list[int]],
) -> None:
    """Send the user's typed messages to the model, and keep the conversation from turn to turn. Ctrl-C ends an answer that is
    shown as it
    comes (of one sample), else the program.

    Args:
        system: message that every conversation begins with.
        prompt_of: token ids of a conversation; raises ValueError where the model cannot be asked it.
    """
    visible = sys.stdin.isatty() and sys.stdout.isatty()
    if visible:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  lines can be edited, and those before them are there
    print("Type a message. /help lists commands, /exit or Ctrl-D ends.", file=sys.stderr, flush=True)
    messages = _beginning(system)
    while True:
        try:
            text = input("> " if visible else "").strip()
        except EOFError:
            if visible:
                print(file=sys.stderr)
            return
        if not text:
            continue
        if found := _COMMAND.match(text):
            command, rest = found[0].lower(), text[found.end() :].strip()
            if command in _ENDS:
                return
            if command == "/system":
                system = rest or None
            if command in (*_RESETS, "/system"):
                messages = _beginning(system)
                told = f"under the system message {system!r}" if system else "without a system message"
                print(f"A new conversation, {told}.", file=sys.stderr, flush=True)
            else:
                _help(command, streams=sampling.samples == 1)
            continue
        asked = [*messages, {"role": "user", "content": text}]
        try:
            ids = prompt_of(asked)
        except ValueError as problem:
            print(f"{problem} (/reset begins anew)", file=sys.stderr, flush=True)
            continue
        response = _answer(generator, tokenizer, ids, sampling)
        messages = [*asked, {"role": "assistant", "content": response}]


def _beginning(system: str | None) -> Messages:
    return [] if system is None else [{"role": "system", "content": system}]


def _help(command: str, streams: bool) -> None:
    if command not in _HELPS:
        names = [name.split()[0] for name in COMMANDS]
        print(f"{command} is no command{nearest(command, names)}; nothing was sent to the model. Commands:", file=sys.stderr)
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {what}" for name, what in COMMANDS.items()]
    ends = "an answer, and the program while you type" if streams else "the program"
    print("\n".join([*lines, f"  Ctrl-C ends {ends}."]), file=sys.stderr, flush=True)


def _answer(generator: Generator, tokenizer: PreTrainedTokenizerFast, ids: list[int], sampling: Sampling) -> str:
    """Shows the answer, or the answers, and returns the last."""
    if sampling.samples == 1:
        return _streamed(generator, tokenizer, ids, sampling)
    response, shown = "", _as_shown()
    for number, completion in enumerate(generator([ids], sampling)[0], 1):
        response = answer_text(completion.token_ids, completion.finish_reason, tokenizer)
        print(f"[{number}] {shown(response)}{_cut(completion)}", flush=True)
    return response


def _streamed(generator: Generator, tokenizer: PreTrainedTokenizerFast, ids: list[int], sampling: Sampling) -> str:
    """Shows the answer as it comes, and returns it."""
    words, tokens, last = DecodeStream(skip_special_tokens=True), [], Completion([], "length")
    shown = _as_shown()
    with _instead_of_interrupting(generator.stop) as stopped:
        for last in generator.stream(ids, sampling):
            for token in last.token_ids:
                tokens.append(token)
                sys.stdout.write(shown(words.step(tokenizer.backend_tokenizer, token) or ""))
            sys.stdout.flush()
    print(" [stopped]" if stopped else _cut(last), flush=True)
    return answer_text(tokens, last.finish_reason, tokenizer)


def _as_shown() -> Callable[[str], str]:
    """Return a function that makes text safe to print: a terminal obeys control characters."""
    return printable if sys.stdout.isatty() else str


def _cut(completion: Completion) -> str:
    return " [cut off]" if completion.finish_reason == "length" else ""


@contextlib.contextmanager
def _instead_of_interrupting(stop: Callable[[], None]) -> Iterator[list[int]]:
    """Make the first Ctrl-C in the context call `stop` and add to the list; a second one interrupts."""
    seen: list[int] = []

    def stopping(number: int, frame: object) -> None:
        seen.append(number)
        if len(seen) == 1:
            stop()
        else:
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, stopping)
    try:
        yield seen
    finally:
        signal.signal(signal.SIGINT, before)
