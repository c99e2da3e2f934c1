"""What a chat template leaves out of a row is refused or told, part by part; what it writes is the same at every start."""

from __future__ import annotations

import copy
import datetime

import pytest

from tests.lib.chat_templates import KINDS, tokenizer_of
from tulu_mega.data import limited_work
from tulu_mega.data.chat import encodings, prompt_of
from tulu_mega.data.messages import NOTHING, Given, conversation_of
from tulu_mega.data.template_day import CLOCK, dated
from tulu_mega.data.template_form import form_of
from tulu_mega.data.told import form_lines
from tulu_mega.records import IGNORE

CHATML = KINDS["ChatML"].template
WRITTEN = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content or '' }}BESIDE<|im_end|>\n{% endfor %}"
CALLS = "{% for c in m.tool_calls or [] %}[{{ c.function.name }}({{ c.function.arguments | tojson }})]{% endfor %}"


def writing(beside):
    return WRITTEN.replace("BESIDE", beside)


ASKED = {"role": "user", "content": "2+1?"}


def call(name):
    return {"type": "function", "function": {"name": name, "arguments": {"x": 1}}}


def tool(name):
    return {"type": "function", "function": {"name": name}}


def called(*calls, content=""):
    return {"messages": [ASKED, {"role": "assistant", "content": content, "tool_calls": list(calls)}]}


def thought(**fields):
    return {"messages": [ASKED, {"role": "assistant", "content": "3", **fields}]}


def of(template, row):
    messages, given = conversation_of(row, row["messages"], training=True)
    return encodings(messages, tokenizer_of(template), "tokenizer", given=given)


ONE_CALL = "{% if m.tool_calls %}[{{ m.tool_calls[0].function }}]{% endif %}"
NO_ARGUMENTS = "{% for c in m.tool_calls or [] %}[{{ c.function.name }}]{% endfor %}"
NO_TEXT_BESIDE = "{% if m.content %}{% elif m.tool_calls %}[{{ m.tool_calls }}]{% endif %}"
THOUGHTS = "{% if m.reasoning_content is string and '<think>' not in m.content %}({{ m.reasoning_content }}){% endif %}"
LEFT_OUT = {
    "the second call": (writing(ONE_CALL), called(call("add"), call("sub")), "call 2 of tool_calls of message 2"),
    "arguments": (writing(NO_ARGUMENTS), called(call("add")), "leaves out the arguments of call 1 of message 2"),
    "calls beside a text": (writing(NO_TEXT_BESIDE), called(call("add"), content="So."), "leaves out tool_calls of message 2"),
    "the second tool": (
        "{% if tools %}{{ tools[0] | tojson }}{% endif %}" + CHATML, {**thought(), "tools": [tool("add"), tool("sub")]},
        r"leaves out tool 2 \(sub\)",
    ),
    "tools without a system message": (
        "{% if messages[0].role == 'system' %}{{ tools | tojson }}{% endif %}" + CHATML, {**thought(), "tools": [tool("add")]},
        "leaves out tools",
    ),
    "reasoning that is no text": (writing(THOUGHTS), thought(reasoning_content=["hm"]), "leaves out reasoning_content"),
    "the user's reasoning": (
        KINDS["Qwen 3"].template, {"messages": [{**ASKED, "reasoning_content": "hm"}, {"role": "assistant", "content": "3"}]},
        "leaves out reasoning_content of message 1",
    ),
    "one reasoning of two": (
        writing(THOUGHTS), thought(reasoning_content="hm") | {"messages": [
            ASKED, {"role": "assistant", "content": "<think>oh</think>3", "reasoning_content": "hm"}]},
        "leaves out reasoning_content of message 2",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LEFT_OUT)
def test_a_part_that_is_left_out_is_named(name):
    template, row, told = LEFT_OUT[name]
    with pytest.raises(ValueError, match=told):
        of(template, row)


def test_parts_that_are_written_are_not_refused():
    row = called(call("add"), call("add"), content="So.") | {"tools": [tool("add"), tool("sub")]}
    assert "[add(" in tokenizer_of("").decode(of("{{ tools | tojson }}" + writing(CALLS), row).whole.ids)
    assert not of(writing(THOUGHTS), thought(reasoning_content="hm")).unread
    twice = {"messages": [ASKED, {"role": "assistant", "content": "<think>hm</think>3", "reasoning_content": "hm"}]}
    assert not of(writing(THOUGHTS), twice).unread, "it stands there"


def test_a_text_of_the_users_that_is_changed_is_told():
    cut = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content[:2] }}<|im_end|>\n{% endfor %}"
    assert of(cut, thought()).unread == {"content of the user's as it stands"}
    assert prompt_of([ASKED], tokenizer_of(cut), "tokenizer")[1] == {"content of the user's as it stands"}
    blanks = [{"role": "user", "content": " a "}, *thought()["messages"][1:]]
    assert not of(KINDS["Llama 3"].template, {"messages": blanks}).unread


def test_a_template_that_draws_lots_writes_the_same_each_time():
    made = [of("{{ range(10 ** 5) | random }}{{ lipsum() }}" + CHATML, thought()).whole for _ in range(2)]
    assert made[0] == made[1] and made[0].labels.count(IGNORE) > 20, "and what is asked is not trained"


def test_a_template_writes_the_day_that_it_is_told(monkeypatch):
    clock = "{% if strftime_now is defined %}{{ strftime_now('%d %b %Y %H:%M') }}{% endif %}" + CHATML
    tokenizer = tokenizer_of(dated(clock, "2024-07-26"))
    for each in (tokenizer, copy.deepcopy(tokenizer)):
        assert each.decode(prompt_of([ASKED], each, "tokenizer")[0]).startswith("26 Jul 2024 00:00<|im_start|>")
    told = form_lines(form_of(tokenizer, NOTHING))
    assert told == ["the chat template writes a date, that of 2024-07-26, the run's first start"]
    assert dated({"default": clock, "tool_use": CHATML}, "2024-07-26") == {"default": tokenizer.chat_template, "tool_use": CHATML}
    assert dated(CHATML, "2024-07-26") == CHATML and dated(None, "2024-07-26") is None and dated(clock, None) == clock

    class Later(datetime.date):
        @classmethod
        def today(cls):
            return cls(2031, 1, 2)

    monkeypatch.setattr("tulu_mega.data.template_day.date", Later)
    asked = {"messages": [ASKED], "add_generation_prompt": True}
    assert limited_work.render(clock, dict(asked), False)[0].startswith("02 Jan 2031 00:00")
    assert limited_work.render(dated(clock, "2024-07-26"), dict(asked), False)[0].startswith("26 Jul 2024 00:00")
    told = form_lines(form_of(tokenizer_of(clock), NOTHING))
    assert told == ["the chat template writes a date, that of the day on which the command runs"]
    with pytest.raises(ValueError, match=f"has {CLOCK}, which is no variable of a template"):
        prompt_of([ASKED], tokenizer_of(clock), "tokenizer", Given(options={CLOCK: "x"}))
