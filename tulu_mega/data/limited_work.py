"""The process behind `limits`: it does one piece of work after the other, each within its limits, until its input ends.

It ends by itself when its input does, and by the kernel's hand when a piece of work takes too long, or nobody asks for a minute:
nothing has to watch it.
"""

from __future__ import annotations

import json
import os
import pickle
import random
import resource
import signal
from collections.abc import Callable
from typing import Any

from tulu_mega.data.limits import LENGTH
from tulu_mega.data.template_day import CLOCK, taken_apart

MOST_TEXT = 1 << 26
"""Characters of a conversation."""
MOST_ENTRIES = 1 << 24
"""Numbers of a vocabulary's entries."""
IDLE_SECONDS = 60
_PROBE = "The  quick, 1234 Größen!\n\n    def f(x): # 😀\n" * 8 + "a" * 400 + " " * 400 + "=" * 400 + "1" * 400 + "é" * 400
"""Text over which a tokenizer's regular expressions take long if they backtrack."""


def render(template: str, arguments: dict[str, Any], marks: bool) -> tuple[str, list[tuple[int, int]]]:
    """Text and marked ranges, as transformers makes them: of a template that draws lots or reads the clock the same each time."""
    from transformers.utils.chat_template_utils import render_jinja_template

    now, template = taken_apart(template)
    random.seed(0)  # of Jinja's `random` and `lipsum`
    others = {name: value for name, value in arguments.items() if name != "messages"}
    texts, ranges = render_jinja_template(
        [arguments["messages"]],
        chat_template=template,
        return_assistant_tokens_mask=marks,
        **{CLOCK: now.strftime, **others},
    )
    if len(texts[0]) > MOST_TEXT:
        raise MemoryError
    return texts[0], [(start, end) for start, end in ranges[0]] if marks else []


def names(template: str) -> tuple[set[str], set[str]]:
    """Variables and fields in a template's code."""
    from jinja2 import Environment, nodes
    from jinja2.ext import Extension

    class Generation(Extension):
        """Reads ``{% generation %}`` as transformers does."""

        tags = {"generation"}

        def parse(self, parser: Any) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    tree = Environment(extensions=[Generation, "jinja2.ext.loopcontrols"]).parse(template)
    fields = {node.attr for node in tree.find_all(nodes.Getattr)}
    fields |= {node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)}
    return {node.name for node in tree.find_all(nodes.Name)}, fields


def try_tokenizer(path: str) -> int:
    """Tokens of a text.

    Raises:
        ValueError: an entry has a number that no vocabulary reaches. Whoever copies or writes such a tokenizer, as transformers
            does where it loads one, holds all the numbers below that have no entry.
    """
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(path)
    if (largest := max(tokenizer.get_vocab().values(), default=0)) > MOST_ENTRIES:
        raise ValueError(f"an entry of its vocabulary has the number {largest}, expected at most {MOST_ENTRIES}")
    tokenizer.no_padding()  # as transformers does
    tokenizer.no_truncation()
    return len(tokenizer.encode(_PROBE, add_special_tokens=False).ids)


WORK: dict[str, Callable[..., Any]] = {each.__name__: each for each in (render, names, try_tokenizer)}


def told(error: BaseException) -> str:
    """What a template raised, for messages."""
    return str(error) if type(error).__module__.startswith("jinja2") else f"{type(error).__name__}: {error}"


def answer(work: str, seconds: float, nbytes: int, arguments: dict[str, Any], before: int) -> dict[str, Any]:
    """Do a piece of work and return its result or its error.

    Args:
        before: bytes that the process had before its first.
    """
    if work == "render":
        import transformers.utils.chat_template_utils  # noqa: F401  which is none of the template's memory and time
    resource.setrlimit(resource.RLIMIT_AS, (before + nbytes, resource.RLIM_INFINITY))
    signal.setitimer(signal.ITIMER_PROF, seconds)  # whose signal ends the process, wherever it is
    try:
        return {"done": WORK[work](**arguments)}
    except MemoryError:
        return {"exceeded": True}
    except BaseException as error:  # also what Rust panics come as
        return {"refused": told(error)[:10_000]}
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def main() -> None:
    """Answers until the input ends."""
    questions, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_RDWR), 0)
    os.dup2(2, 1)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for number in (signal.SIGPROF, signal.SIGALRM):
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGPROF, signal.SIGALRM))
    while True:
        signal.alarm(IDLE_SECONDS)  # whose signal ends the process
        head = questions.read(LENGTH.size)
        signal.alarm(0)
        if len(head) < LENGTH.size:
            break
        work, seconds, nbytes, arguments = pickle.loads(questions.read(LENGTH.unpack(head)[0]))  # noqa: S301 of who started us
        with open("/proc/self/statm") as told:
            before = int(told.read().split()[0]) * resource.getpagesize()
        content = json.dumps(answer(work, seconds, nbytes, arguments, before), default=list).encode()
        answers.write(LENGTH.pack(len(content)) + content)
        answers.flush()


if __name__ == "__main__":
    main()
