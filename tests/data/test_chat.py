"""What is trained is exactly the assistant's text and its end; our rendering and the shipped template agree."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tulu_mega.data.chat import check_messages, encode, prompt_ids, render_tulu, template_of, tulu_prompt
from tulu_mega.data.messages import Given, conversation_of
from tulu_mega.data.tulu_template import TULU_CHAT_TEMPLATE
from tulu_mega.records import IGNORE

EOS = "<|end_of_text|>"
TALK = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "hi you 😀"},
    {"role": "user", "content": "bye"},
    {"role": "assistant", "content": "bye"},
]
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

conversations = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["system", "user", "assistant"]), "content": st.text(alphabet=" \nabhi😀é<|>{}%", max_size=12)}
    ),
    min_size=1,
    max_size=6,
)
same_fixture = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def trained(tokenizer, ids, labels):
    """The runs of trained tokens as texts; checks that a label is its token."""
    assert len(ids) == len(labels)
    runs, current = [], []
    for token, label in zip([*ids, 0], [*labels, IGNORE], strict=True):
        if label != IGNORE:
            assert label == token
            current.append(token)
        elif current:
            runs.append(tokenizer.decode(current))
            current = []
    return runs


def test_the_published_format_to_the_letter():
    rendered = render_tulu(TALK, EOS)
    assert rendered.text == (
        f"<|system|>\nbe brief\n<|user|>\nhi\n<|assistant|>\nhi you 😀{EOS}\n<|user|>\nbye\n<|assistant|>\nbye{EOS}"
    )
    assert [rendered.text[start:end] for start, end, _message in rendered.spans] == [f"hi you 😀{EOS}", f"bye{EOS}"]
    assert tulu_prompt(TALK[:2], EOS) == "<|system|>\nbe brief\n<|user|>\nhi\n<|assistant|>\n"


def test_all_assistant_turns_are_trained_and_nothing_else(tokenizer):
    ids, labels = encode(TALK, tokenizer, "tulu", None)
    assert tokenizer.decode(ids) == render_tulu(TALK, EOS).text
    assert trained(tokenizer, ids, labels) == [f"hi you 😀{EOS}", f"bye{EOS}"]


def test_a_token_that_begins_in_the_prompt_is_masked(tokenizer):
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "\nhi"}]
    ids, labels = encode(talk, tokenizer, "tulu", None)
    merged = tokenizer.convert_tokens_to_ids("ĊĊ")
    assert merged in ids and labels[ids.index(merged)] == IGNORE
    assert trained(tokenizer, ids, labels) == [f"hi{EOS}"]


def test_truncation_is_on_the_right(tokenizer):
    ids, labels = encode(TALK, tokenizer, "tulu", None)
    for length in (1, 40, len(ids) - 1, len(ids), len(ids) + 5):
        assert encode(TALK, tokenizer, "tulu", length) == (ids[:length], labels[:length])


@same_fixture
@given(conversations)
def test_the_shipped_template_renders_and_masks_alike(tokenizer, messages):
    tokenizer.chat_template = TULU_CHAT_TEMPLATE
    rendered = render_tulu(messages, EOS)
    assert tokenizer.apply_chat_template(messages, tokenize=False) == rendered.text
    assert tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == tulu_prompt(messages, EOS)
    assert prompt_ids(messages, tokenizer, "tokenizer") == prompt_ids(messages, tokenizer, "tulu")
    if rendered.spans:
        assert encode(messages, tokenizer, "tokenizer", None) == encode(messages, tokenizer, "tulu", None)


def test_hugging_face_gives_the_same_mask_from_the_shipped_template(tokenizer):
    tokenizer.chat_template = TULU_CHAT_TEMPLATE
    theirs = tokenizer.apply_chat_template(TALK, return_dict=True, return_assistant_tokens_mask=True)
    ids, labels = encode(TALK, tokenizer, "tulu", None)
    assert theirs["input_ids"] == ids
    assert theirs["assistant_masks"] == [int(label != IGNORE) for label in labels]


def test_a_model_is_asked_under_the_template_it_ships(tokenizer):
    assert template_of(tokenizer, "auto") == template_of(tokenizer, "tulu") == "tulu", "base models ship none"
    tokenizer.chat_template = CHATML
    assert template_of(tokenizer, "auto") == "tokenizer"
    assert template_of(tokenizer, "tulu") == "tulu"


def test_a_template_without_marks_is_told_by_prefixes(tokenizer):
    tokenizer.chat_template = CHATML
    ids, labels = encode(TALK, tokenizer, "tokenizer", None)
    assert tokenizer.decode(ids) == tokenizer.apply_chat_template(TALK, tokenize=False)
    assert trained(tokenizer, ids, labels) == [f"hi you 😀{EOS}", f"bye{EOS}"]


def test_marks_without_the_end_keep_every_byte_of_the_last_character(tokenizer):
    tokenizer.chat_template = CHATML.replace(
        "m['content'] + eos_token",
        "'' }}{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}{% endgeneration %}{% else %}"
        "{{ m['content'] }}{% endif %}{{ eos_token",
    )
    assert trained(tokenizer, *encode(TALK, tokenizer, "tokenizer", None)) == ["hi you 😀", "bye"]


def test_a_template_that_refuses_is_about_the_row(tokenizer):
    tokenizer.chat_template = CHATML + "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(ValueError, match="roles must alternate"):
        encode(TALK, tokenizer, "tokenizer", None)


@pytest.mark.parametrize(
    ("messages", "text"),
    [
        (None, "NoneType"),
        ([], "at least one message"),
        ("hi", "expected a list"),
        (["hi"], "message 1 is 'hi'"),
        ([{"role": "user"}], "message 1 has content None"),
        ([{"role": "user", "content": [{"type": "text"}]}], "expected text"),
        ([{"content": "hi"}], "message 1 has role None"),
        ([{"role": "user", "content": "x"}, {"role": "gpt", "content": "x"}], "message 2 has role 'gpt'"),
        ([{"role": "user", "content": "x", "tool_calls": [{}]}], "message 1 has tool_calls, but is the user's"),
        ([{"role": "assistant", "content": None, "tool_calls": "f()"}], "message 1 has tool_calls 'f()'"),
        ([{"role": "assistant", "content": None, "tool_calls": []}], "message 1 has content None"),
        ([{"role": "assistant", "content": "", "tool_calls": [{"function": {"arguments": "{"}}]}], "expected JSON"),
        ([{"role": "assistant", "content": "x", "weight": 0.5}], "message 1 has weight 0.5"),
        ([{"role": "assistant", "content": "x", "weight": "0"}], "message 1 has weight '0'"),
        ([{"role": "user", "content": "x", "weight": 1}, {"role": "assistant", "content": "x"}], "only the assistant's turns"),
        ([{"role": "assistant", "content": "x", "reasoning_content": "\ud800"}], "surrogate"),
        ([{"role": ["user"], "content": "x"}], "message 1 has role"),
        ([{"role": "user", "content": "hi"}], "nothing to train"),
        ([{"role": "user", "content": "\ud800"}], "surrogate"),
    ],
)
def test_malformed_conversations_say_what_is_wrong(messages, text):
    with pytest.raises(ValueError) as caught:
        check_messages(messages, training=True)
    assert text in str(caught.value)


def test_fields_that_are_null_are_left_out_and_arguments_become_objects():
    call = {"type": "function", "function": {"name": "f", "arguments": '{"a": 2}'}}
    talk = [{"role": "user", "content": "a", "id": 3, "name": None}, {"role": "assistant", "content": None, "tool_calls": [call]}]
    user, answer = check_messages(talk, training=False)
    assert user == {"role": "user", "content": "a", "id": 3}
    assert answer["content"] is None and answer["tool_calls"][0]["function"] == {"name": "f", "arguments": {"a": 2}}


def test_tulus_template_refuses_what_it_has_no_form_for(tokenizer):
    for more, told in [
        ({"role": "tool", "content": "5"}, "message 2 has role 'tool'"),
        ({"role": "assistant", "content": "5", "reasoning_content": "2 and 3"}, "message 2 has reasoning_content"),
        ({"role": "assistant", "content": "5", "tool_calls": [{"name": "f"}]}, "message 2 has tool_calls"),
    ]:
        with pytest.raises(ValueError, match=told):
            prompt_ids([{"role": "user", "content": "hi"}, more], tokenizer, "tulu")
    with pytest.raises(ValueError, match="tools are given"):
        prompt_ids(TALK[:2], tokenizer, "tulu", Given(tools=[{"name": "f"}]))


def test_a_name_that_json_text_in_a_row_has_twice_is_refused():
    call = {"function": {"name": "f", "arguments": '{"a": 1, "a": 2}'}}
    called = [{"role": "assistant", "content": "", "tool_calls": [call]}]
    for row in ({"messages": called}, {"messages": [{"role": "user", "content": "a"}], "tools": '[{"name": "f", "name": "g"}]'}):
        with pytest.raises(ValueError, match=r"it has '(a|name)' twice"):
            conversation_of(row, row["messages"], training=False)
