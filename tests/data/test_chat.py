"""What is trained is exactly the assistant's text and its end; our rendering and the shipped template agree."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tulu_mega.data.chat import TULU_CHAT_TEMPLATE, check_messages, encode, prompt_ids, render_tulu, template_of, tulu_prompt
from tulu_mega.errors import UserError
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
    assert [rendered.text[start:end] for start, end in rendered.spans] == [f"hi you 😀{EOS}", f"bye{EOS}"]
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
        "m['content'] + eos_token", "'' }}{% generation %}{{ m['content'] }}{% endgeneration %}{{ eos_token"
    ).replace("{% for m in messages %}", "{% for m in messages if m['role'] == 'assistant' %}")
    assert trained(tokenizer, *encode(TALK, tokenizer, "tokenizer", None)) == ["hi you 😀", "bye"]


def test_a_template_that_rewrites_earlier_turns_is_refused(tokenizer):
    tokenizer.chat_template = CHATML.replace("m['content']", "(m['content'] if loop.last else 'cut')")
    with pytest.raises(UserError, match="otherwise than inside the whole"):
        encode(TALK, tokenizer, "tokenizer", None)


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
        ([{"role": "user", "content": "x"}, {"role": "tool", "content": "x"}], "message 2 has role 'tool'"),
        ([{"role": ["user"], "content": "x"}], "message 1 has role"),
        ([{"role": "user", "content": "hi"}], "nothing to train"),
        ([{"role": "user", "content": "\ud800"}], "surrogate"),
    ],
)
def test_malformed_conversations_say_what_is_wrong(messages, text):
    with pytest.raises(ValueError) as caught:
        check_messages(messages, training=True)
    assert text in str(caught.value)


def test_other_keys_are_left_out():
    assert check_messages([{"role": "user", "content": "a", "id": 3}], training=False) == [{"role": "user", "content": "a"}]
