"""Under chat templates of many kinds what is trained is the assistant's text and its end, and nothing else."""

from __future__ import annotations

from itertools import groupby
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.lib.chat_templates import KINDS, Kind, tokenizer_of
from tulu_mega.data.chat import Encodings, conversation_ids, encodings, prompt_ids, template_of
from tulu_mega.data.messages import NOTHING, Given, conversation_of
from tulu_mega.data.stops import answer_text, stop_ids
from tulu_mega.data.template_form import form_of
from tulu_mega.records import IGNORE

TOKENIZERS = {name: tokenizer_of(kind.template) for name, kind in KINDS.items()}
every_kind = pytest.mark.parametrize("name", KINDS)
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]


def talk(*texts: str, system: str = "") -> list[dict[str, Any]]:
    start = [{"role": "system", "content": system}] if system else []
    return start + [{"role": ("user", "assistant")[at % 2], "content": text} for at, text in enumerate(texts)]


def encoded(name: str, row: dict[str, Any] | list[dict[str, Any]], turns: str = "all") -> Encodings:
    row = row if isinstance(row, dict) else {"messages": row}
    messages, beside = conversation_of(row, row["messages"], training=True)
    return encodings(messages, TOKENIZERS[name], "tokenizer", turns, beside)


def trained(name: str, ids: list[int], labels: list[int], *_) -> list[str]:
    """The runs of trained tokens as texts; a label is its token."""
    assert all(label in (IGNORE, token) for token, label in zip(ids, labels, strict=True))
    runs = groupby(zip(ids, labels, strict=True), lambda pair: pair[1] != IGNORE)
    return [TOKENIZERS[name].decode([token for token, _ in run]) for is_trained, run in runs if is_trained]


def turn(kind: Kind, text: str, last: bool = True) -> str:
    thought = "<think>\n\n</think>\n\n" if kind.rewrites and last else ""
    return thought + kind.blank + (text.strip() if kind.strips else text) + kind.end


texts = st.text(alphabet=" \nabhi😀é", min_size=1, max_size=8).filter(lambda text: text.strip() and text[0] != "\n")
"""Not such as begin with a newline: the tokenizer has a token of two of them, which then begins in the prompt."""


@every_kind
@settings(max_examples=25, deadline=None)
@given(
    said=st.lists(texts, min_size=2, max_size=6).filter(lambda said: len(said) % 2 == 0), system=st.sampled_from(["", "be brief"])
)
def test_trained_are_the_assistants_texts_with_their_ends(name, said, system):
    kind, tokenizer = KINDS[name], TOKENIZERS[name]
    messages = talk(*said, system=system if kind.system else "")
    made = encoded(name, messages)
    assert tokenizer.decode(made.whole.ids) == tokenizer.apply_chat_template(messages, tokenize=False)
    answers = [message["content"] for message in messages if message["role"] == "assistant"]
    found = trained(name, *made.whole[:2])
    if kind.rewrites:  # an answer without a thought is asked with an empty one, which is gone once more follows
        assert found == [turn(kind, answers[-1])]
        assert [trained(name, *one[:2]) for one in made.rewritten] == [[turn(kind, answer)] for answer in answers[:-1]]
    else:
        assert found == [turn(kind, answer) for answer in answers] and not made.rewritten
    assert trained(name, *encoded(name, messages, "last").whole[:2]) == found[-1:]
    ends = [tokenizer.decode([token]) for token, _length in made.whole.ends]
    assert all(end == (kind.end if kind.stops else kind.end[-1]) for end in ends) and len(ends) == len(found)


@every_kind
def test_a_prompt_and_its_answer_are_what_is_trained(name):
    kind, tokenizer = KINDS[name], TOKENIZERS[name]
    messages = talk("hi", "you", "who", "am I")
    asked = prompt_ids(messages[:-1], tokenizer, "tokenizer")
    assert tokenizer.decode(asked).endswith(kind.header)
    whole = encoded(name, messages).whole
    assert whole.ids[: len(asked)] == asked
    first = next(at for at, label in enumerate(whole.labels) if label != IGNORE and at >= len(asked))
    assert first == len(asked)
    assert conversation_ids(messages, tokenizer, "tokenizer") == whole.ids


@every_kind
def test_generation_stops_where_training_did(name):
    kind, tokenizer = KINDS[name], TOKENIZERS[name]
    expected = [tokenizer.eos_token, kind.end] if kind.stops else [tokenizer.eos_token]
    stops = stop_ids(tokenizer, "tokenizer", None)
    assert tokenizer.convert_ids_to_tokens(stops) == list(dict.fromkeys(expected))
    answer = tokenizer("So 5" + kind.end, add_special_tokens=False)["input_ids"]
    if kind.stops:
        assert answer_text(answer, "stop", tokenizer) == "So 5"
    assert answer_text(answer[:-1], "length", tokenizer).startswith("So 5")


@every_kind
def test_a_system_message_is_taken_refused_or_told(name):
    row = {"system": "be brief", "messages": talk("hi", "you")}
    if KINDS[name].system:
        assert "be brief" in TOKENIZERS[name].decode(encoded(name, row).whole.ids)
    else:
        with pytest.raises(ValueError, match="refuses this conversation"):
            encoded(name, row)


@every_kind
def test_what_says_something_is_written_or_refused(name):
    call = {"type": "function", "function": {"name": "add", "arguments": '{"a": 2, "b": 3}'}}
    calling = [
        *talk("Add 2 and 3"),
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "five"},
    ]
    row = {"tools": TOOLS, "messages": [*calling, {"role": "assistant", "content": "So 5.", "reasoning_content": "hmm"}]}
    if KINDS[name].tools:
        made = encoded(name, row)
        called = '<tool_call>\n{"name": "add", "arguments": {"a": 2, "b": 3}}\n</tool_call><|im_end|>'
        assert trained(name, *made.whole[:2]) == ["<think>\nhmm\n</think>\n\nSo 5.<|im_end|>"]
        assert [trained(name, *one[:2]) for one in made.rewritten] == [["<think>\n\n</think>\n\n" + called]]
        row["messages"][1]["reasoning_content"] = "a tool"  # which a template that goes on with it keeps
        made = encoded(name, row)
        assert trained(name, *made.whole[:2])[0] == "<think>\na tool\n</think>\n\n" + called and not made.rewritten
        assert '"name": "add", "parameters"' in TOKENIZERS[name].decode(encoded(name, row).whole.ids)
        return
    for part, told in [
        ({"tools": TOOLS, "messages": talk("hi", "you")}, "leaves out tools"),
        ({"messages": row["messages"][:2]}, "leaves out tool_calls of message 2"),
        ({"messages": [*talk("hi"), row["messages"][-1]]}, "leaves out reasoning_content of message 2"),
    ]:
        with pytest.raises(ValueError, match=told):
            encoded(name, part)


@every_kind
def test_turns_of_weight_0_are_not_trained(name):
    messages = talk("hi", "you", "who", "am I")
    messages[1]["weight"] = 0
    assert trained(name, *encoded(name, messages).whole[:2]) == [turn(KINDS[name], "am I")]
    messages[3]["weight"] = 0.0
    assert trained(name, *encoded(name, messages).whole[:2]) == []


@every_kind
def test_the_assistant_may_begin_or_go_on_where_the_template_lets_it(name):
    kind = KINDS[name]
    for messages in ([{"role": "assistant", "content": "hello"}, *talk("hi", "you")], [*talk("hi", "you"), talk("", "too")[1]]):
        if kind.alternates:
            with pytest.raises(ValueError, match="alternate"):
                encoded(name, messages)
        elif not kind.rewrites:
            said = [message["content"] for message in messages if message["role"] == "assistant"]
            assert trained(name, *encoded(name, messages).whole[:2]) == [turn(kind, text) for text in said]


def test_marks_agree_with_transformers():
    tokenizer, messages = TOKENIZERS["ChatML, marked"], talk("hi", "you", "who", "am I")
    theirs = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    whole = encoded("ChatML, marked", messages).whole
    assert theirs["input_ids"] == whole.ids
    assert theirs["assistant_masks"] == [int(label != IGNORE) for label in whole.labels]


def test_options_of_a_row_reach_the_template():
    tokenizer = TOKENIZERS["Qwen 3"]
    beside = Given(options={"enable_thinking": False})
    assert tokenizer.decode(prompt_ids(talk("hi"), tokenizer, "tokenizer", beside)).endswith("assistant\n<think>\n\n</think>\n\n")
    made = encoded("Qwen 3", {"messages": talk("hi", "you"), "chat_template_kwargs": {"enable_thinking": False, "odd": 1}})
    assert trained("Qwen 3", *made.whole[:2]) == ["you<|im_end|>"], "the empty thought is asked for"
    assert made.unread == {"chat_template_kwargs.odd"}


def test_a_message_that_a_template_leaves_out_is_refused():
    row = [*talk("hi"), {"role": "tool", "content": "5"}, {"role": "assistant", "content": "So 5."}]
    with pytest.raises(ValueError, match=r"leaves out message 2 \(the tool's\)"):
        encoded("OLMo 2", row)
    with pytest.raises(ValueError, match="leaves out message 2"):
        prompt_ids(row[:2], TOKENIZERS["OLMo 2"], "tokenizer")


def test_whatever_a_template_raises_is_about_the_row():
    for code, told in [("{{ tools | length }}", "TypeError"), ("{{ 1 // 0 }}", "ZeroDivisionError"), ("{% for %}", "refuses")]:
        tokenizer = tokenizer_of(code + KINDS["ChatML"].template)
        with pytest.raises(ValueError, match=told):
            encodings(talk("hi", "you"), tokenizer, "tokenizer")


def test_what_is_known_of_templates():
    never, always = (form_of(TOKENIZERS[f"ChatML that {word} begins an answer"], NOTHING) for word in ("never", "always"))
    assert (never.header, never.header_behind) == ("<|im_start|>assistant\n", False)
    assert (always.header, always.header_behind) == ("", True)
    marks = KINDS["ChatML, marked"].template.replace(
        "+ '<|im_end|>' }}{% endgeneration %}{{ '", "}}{% endgeneration %}{{ '<|im_end|>"
    )
    assert not form_of(tokenizer_of(marks), NOTHING).ending_trained
    assert form_of(TOKENIZERS["ChatML, marked"], NOTHING).ending_trained
    assert template_of(None, "auto") == "tulu", "rows that have tokens already"


THOUGHTS_AND_WORDS = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ '<|im_start|>user\n' + m.content + '<|im_end|>\n' }}{% else %}"
    "{{ '<|im_start|>assistant\n' }}{% if m.reasoning_content and loop.last %}{% generation %}"
    "{{ '<think>' + m.reasoning_content + '</think>' }}{% endgeneration %}{% endif %}"
    "{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def test_a_turn_of_several_marks_is_trained_whole():
    """Earlier turns have fewer marks than when they were the last: their thoughts are dropped."""
    tokenizer = tokenizer_of(THOUGHTS_AND_WORDS)
    messages = talk("hi", "one", "and", "two")
    messages[1]["reasoning_content"], messages[3]["reasoning_content"] = "r1", "r2"
    made = encodings(messages, tokenizer, "tokenizer")
    labels = [token for token in made.whole.labels if token != IGNORE]
    assert tokenizer.decode(labels).endswith("<think>r2</think>two<|im_end|>")


def test_a_variable_of_a_template_is_no_field_of_a_message():
    template = "{% if thinking is defined and thinking %}{{ 'x' }}{% endif %}" + KINDS["ChatML"].template
    messages = [*talk("hi"), {"role": "assistant", "content": "5", "thinking": "2+3"}]
    with pytest.raises(ValueError, match="leaves out thinking of message 2"):
        encodings(messages, tokenizer_of(template), "tokenizer")


def test_arguments_of_the_renderer_are_no_variables_of_a_template():
    with pytest.raises(ValueError, match="continue_final_message, which is no variable"):
        encoded("ChatML", {"messages": talk("hi", "you"), "chat_template_kwargs": {"continue_final_message": True}})


def test_nulls_of_a_table_are_no_arguments_of_a_call():
    call = {"name": "add", "arguments": {"x": 1, "y": None, "z": [{"k": None, "l": 2}]}}
    row = {"messages": [*talk("hi"), {"role": "assistant", "content": None, "tool_calls": [call]}]}
    messages, _ = conversation_of(row, row["messages"], training=True)
    assert messages[1]["tool_calls"][0]["arguments"] == {"x": 1, "z": [{"l": 2}]}


def test_what_is_nested_too_deeply_is_about_the_row():
    deep: Any = 1
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(ValueError, match="nested too deeply"):
        conversation_of({}, [*talk("hi"), {"role": "assistant", "content": "x", "beside": deep}], training=True)
