"""Chat templates and tokenizers of unknown origin: refused in a line where they take too much; as before otherwise."""

from __future__ import annotations

import json
import os
import signal
import threading
import time

import pytest

from tests.lib.chat_templates import KINDS
from tests.lib.tokenizers import byte_tokenizer
from tulu_mega.data import limited_work, limits, template_form
from tulu_mega.data.chat import conversation_ids, encode
from tulu_mega.data.limits import Limits
from tulu_mega.data.tokenizer import load_tokenizer
from tulu_mega.data.tulu_template import TULU_CHAT_TEMPLATE
from tulu_mega.errors import UserError

TALK = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "Yes, b."}]
GIVEN = {"messages": TALK, "tools": None, "add_generation_prompt": False, "eos_token": "<|end|>"}
LITTLE = Limits(0.3, 256 << 20)
TWICE = "{% set n = namespace(x='ab') %}{% for i in range(60) %}"
TOO_MUCH = {
    "loops in loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "macros that call themselves twice": (
        "{% macro f(n) %}{% if n < 99 %}{{ f(n + 1) }}{{ f(n + 1) }}{% endif %}{% endmacro %}{{ f(0) }}"
    ),
    "a text many times": "{{ 'x' * 10**10 }}",
    "a list many times": "{{ [1] * 10**10 }}",
    "a text twice, again and again": TWICE + "{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}",
    "a block twice, again and again": TWICE + "{% set y %}{{ n.x }}{{ n.x }}{% endset %}{% set n.x = y %}{% endfor %}{{ n.x }}",
    "a filter": "{{ 'x' | center(10**10) }}",
    "a format": "{{ '%9999999999d' % 1 }}",
    "another format": "{{ '{:9999999999}'.format(1) }}",
    "a method": "{{ (1).to_bytes(10**10, 'big') }}",
    "words": "{{ lipsum(10**9) }}",
    "while it is compiled": "{{ 'x' * 10**9 * 10 }}",
    "a long text": "{{ 'x' * 70000000 }}",
}


@pytest.fixture
def little(monkeypatch) -> None:
    """Limits that are soon reached. What a process imports before its first work is none of that."""
    limits.rendered("x", GIVEN, False)
    monkeypatch.setattr(limits, "TEMPLATE", LITTLE)
    monkeypatch.setattr(limits, "TOKENIZER", LITTLE)


SLOW = ("macros that call themselves twice", "words")
"""Like loops in loops these end the process, which takes seconds to start again."""


@pytest.mark.parametrize(
    "template",
    [pytest.param(each, id=name, marks=[pytest.mark.acceptance] * (name in SLOW)) for name, each in TOO_MUCH.items()],
)
def test_a_template_that_takes_too_much_is_refused(little, template):
    start = time.monotonic()
    with pytest.raises(UserError, match="chat template cannot be used: it took more than") as refused:
        limits.rendered(template, GIVEN, False)
    assert len(str(refused.value)) < 300 and time.monotonic() - start < 120


def test_it_ends_the_command_and_not_a_row_alone(little):
    tokenizer = byte_tokenizer(chat_template=TOO_MUCH["loops in loops"])
    for encoding in (conversation_ids, encode):
        with pytest.raises(UserError, match="chat template cannot be used"):
            encoding(TALK, tokenizer, "tokenizer", *([99] if encoding is encode else []))


def test_what_a_template_raises_is_of_its_row():
    for template, told in (
        ("{{ raise_exception('no tools') }}", "no tools"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{% x", "tag"),
    ):
        with pytest.raises(ValueError, match=f"refuses this conversation: .*{told}"):
            conversation_ids(TALK, byte_tokenizer(chat_template=template), "tokenizer")
    assert limits.rendered("{{ messages | length }}", GIVEN, False) == ("2", [])


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_a_template_says_what_it_says_here(kind):
    """The process that renders is another; the text and the marks are the same."""
    for talk in (TALK, [{"role": "user", "content": "\ud7ff\u2028\x00é\n"}, *TALK[1:]]):
        given = GIVEN | {"messages": talk, "bos_token": "<s>"}
        for marks in (False, True) if "generation" in kind.template else (False,):
            assert limits.rendered(kind.template, given, marks) == limited_work.render(kind.template, given, marks)
    variables, fields = limited_work.names(kind.template)
    assert limits.names(kind.template) == (variables, fields)


def test_our_own_template_needs_no_process(monkeypatch):
    monkeypatch.setattr(limits._worker, "do", lambda *_, **__: pytest.fail("a process was asked"))
    assert encode(TALK, byte_tokenizer(chat_template=TULU_CHAT_TEMPLATE), "tokenizer", 99)


def test_the_process_is_anothers_after_a_fork_and_gone_with_its_owner():
    limits.names("{{ x }}")
    first = limits._worker._process.pid
    if not (child := os.fork()):
        same = limits.names("{{ y }}")[0] == {"y"} and limits._worker._process.pid != first
        limits._worker.close()
        os._exit(0 if same else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert limits.names("{{ z }}")[0] == {"z"} and limits._worker._process.pid == first
    process = limits._worker._process
    limits._worker.close()
    assert process.poll() is not None and limits.names("{{ z }}")[0] == {"z"}


@pytest.mark.parametrize("seen", [True, False])
def test_a_process_that_has_gone_for_want_of_work_is_started_again(seen):
    """Whether its end is seen before it is asked, or after."""
    limits.names("{{ x }}")
    process = limits._worker._process
    if not seen:
        os.kill(process.pid, signal.SIGSTOP)
        os.waitpid(process.pid, os.WUNTRACED)
    os.kill(process.pid, signal.SIGALRM)
    if seen:
        process.wait()
    else:
        threading.Timer(0.3, os.kill, (process.pid, signal.SIGCONT)).start()
    assert limits.names("{{ y }}")[0] == {"y"} and limits._worker._process.pid != process.pid


def test_a_tokenizer_leaves_no_process_behind(tmp_path):
    directory = files_of(tmp_path / "tokenizer")
    limits._worker.close()
    load_tokenizer(str(directory))
    assert not limits._worker.works


def test_the_variables_of_a_row_are_not_the_conversation():
    with pytest.raises(ValueError, match="chat_template_kwargs has messages"):
        template_form.rendered(TALK, byte_tokenizer(chat_template="x"), template_form.Given(None, {"messages": []}))


# -- tokenizers -------------------------------------------------------------------------------------------------------------


def files_of(directory):
    byte_tokenizer().save_pretrained(directory)
    return directory


def changed(directory, name: str, **fields) -> None:
    file = directory / name
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def with_number(directory, number: int) -> dict:
    model = json.loads((directory / "tokenizer.json").read_text())["model"]
    return model | {"vocab": model["vocab"] | {"far": number}}


def test_a_tokenizers_files_are_looked_at_before_they_are_loaded(tmp_path, little, monkeypatch):
    monkeypatch.setattr("tulu_mega.data.tokenizer.MAX_JSON_BYTES", 1 << 20)
    damages = {
        "FIFO": lambda directory: [(directory / "tokenizer.json").unlink(), os.mkfifo(directory / "tokenizer.json")],
        "a device": lambda directory: [(directory / "merges.txt").symlink_to("/dev/zero")],
        "large": lambda directory: (directory / "vocab.json").write_bytes(bytes(2 << 20)),
        "deep": lambda directory: (directory / "tokenizer_config.json").write_bytes(b"[" * 100_000),
        "no vocabulary": lambda directory: changed(directory, "tokenizer.json", model={"type": "BPE"}),
        "a number that no vocabulary has": lambda directory: changed(
            directory, "tokenizer.json", model=with_number(directory, 40_000_000)
        ),
        "a length of text": lambda directory: changed(directory, "tokenizer_config.json", model_max_length="x"),
        "an expression that goes back and forth": lambda directory: changed(
            directory, "tokenizer.json",
            pre_tokenizer={"type": "Split", "pattern": {"Regex": "(a|aa|aaa)+$(?=b)"}, "behavior": "Isolated", "invert": False},
        ),
    }  # fmt: skip
    for name, damage in damages.items():
        directory = files_of(tmp_path / name.replace(" ", "_"))
        assert load_tokenizer(str(directory)).eos_token
        damage(directory)
        start = time.monotonic()
        with pytest.raises(UserError, match="the tokenizer cannot be loaded"):
            load_tokenizer(str(directory))
        assert time.monotonic() - start < 120, name


def test_a_tokenizer_of_a_relative_name_is_found_wherever_the_process_began(tmp_path, monkeypatch):
    limits.rendered("x", GIVEN, False)
    files_of(tmp_path / "tokenizer")
    monkeypatch.chdir(tmp_path)
    assert load_tokenizer("./tokenizer").eos_token


def test_a_tokenizer_is_tried_once(tmp_path, monkeypatch):
    directory, tried = files_of(tmp_path / "tokenizer"), []
    monkeypatch.setattr(limits, "tried", tried.append)
    for _ in range(3):
        load_tokenizer(str(directory))
    assert tried == [str(directory / "tokenizer.json")]
