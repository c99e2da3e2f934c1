"""Rows as public data sets have them, read into messages: what each comes to, in which order forms are looked for, refusals."""

from __future__ import annotations

import json

import pytest

from tests.lib.chat_templates import KINDS, tokenizer_of
from tulu_mega.config import DataInspectSettings, DataSettings, ModelSettings, PreferenceDataSettings, SftSettings
from tulu_mega.data.encoding import PairEncoding
from tulu_mega.data.forms.rated import Useless
from tulu_mega.data.forms.reading import any_messages, read
from tulu_mega.data.prepare import prepare
from tulu_mega.data.prompts import read_prompts
from tulu_mega.data.sources import load_rows
from tulu_mega.data.tools.decontaminate import row_texts
from tulu_mega.data.tools.row_kind import of_its_kind, stages_of
from tulu_mega.errors import UserError
from tulu_mega.preflight.earlier_defaults import as_before


def user(text):
    return {"role": "user", "content": text}


def said(text):
    return {"role": "assistant", "content": text}


def speaks(who, text):
    return {"from": who, "value": text}


CALL = {"name": "weather", "arguments": {"city": "Oslo"}}
TALK = [speaks("system", "brief"), speaks("human", "2+1?"), speaks("gpt", "3")]
TALK_READ = [{"role": "system", "content": "brief"}, user("2+1?"), said("3")]
CONVERSATIONS = {
    "openai": ({"messages": TALK_READ}, "messages", TALK_READ),
    "openai with sharegpt's turns": ({"messages": TALK}, "messages", TALK_READ),
    "sharegpt": ({"conversations": TALK}, "sharegpt", TALK_READ),
    "lmsys": ({"conversation": TALK_READ}, "sharegpt", TALK_READ),
    "sharegpt of other speakers": (
        {"conversations": [speaks("User", "a"), {**speaks("chatgpt", "b"), "weight": 0}, speaks("Assistant", "d")]},
        "sharegpt",
        [user("a"), {**said("b"), "weight": 0}, said("d")],
    ),
    "sharegpt with tools": (
        {"conversations": [speaks("human", "Cold?"), speaks("function_call", json.dumps(CALL)), speaks("observation", "-3")]},
        "sharegpt",
        [user("Cold?"), {**said(""), "tool_calls": [{"type": "function", "function": CALL}]}, {"role": "tool", "content": "-3"}],
    ),
    "alpaca": ({"instruction": "Add.", "input": "2 1", "output": "3"}, "alpaca", [user("Add.\n2 1"), said("3")]),
    "alpaca without input": ({"instruction": "Hi.", "input": "", "output": "Ho"}, "alpaca", [user("Hi."), said("Ho")]),
    "alpaca with history": (
        {"instruction": "c", "output": "d", "history": [["a", "b"]]}, "alpaca", [user("a"), said("b"), user("c"), said("d")]
    ),
    "dolly": ({"instruction": "Add.", "context": "2 1", "response": "3"}, "alpaca", [user("Add.\n2 1"), said("3")]),
    "trl": ({"prompt": "2+1?", "completion": "3"}, "prompt", [user("2+1?"), said("3")]),
    "trl, conversational": ({"prompt": [user("2+1?")], "completion": [said("3")]}, "prompt", [user("2+1?"), said("3")]),
}  # fmt: skip


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_conversations(name):
    row, form, messages = CONVERSATIONS[name]
    made = read({**row, "id": 7, "system": None}, "conversation")
    assert (made.form, made.row["messages"], made.row["id"], made.unused) == (form, messages, 7, ())
    assert set(made.row) == {"messages", "id", "system"}
    assert read(row, "conversation", form) == read(row, "conversation"), "named or not"


ONE, OTHER = [user("2+1?"), said("3")], [user("2+1?"), said("4")]
DIALOGUE = "\n\nHuman: 1+1?\n\nAssistant: 2\n\nHuman: +1?\n\nAssistant:"
TURNS = [user("1+1?"), said("2"), user("+1?")]
SIDES = {"chosen": "3", "rejected": "4"}
RATED = [{"response": text, "annotations": {"helpfulness": {"Rating": rating}, "honesty": {"Rating": "N/A"}}, "overall_score": 10}
         for text, rating in (("4", "1"), ("3", "5"))]  # fmt: skip
PAIRS = {
    "tulu": ({"chosen": ONE, "rejected": OTHER, "prompt": "2+1?"}, "messages", ONE, OTHER, ["prompt"]),
    "ultrafeedback, binarized": (
        {"prompt": "2+1?", "messages": ONE, "chosen": ONE, "rejected": OTHER, "score_chosen": 8.0}, "messages", ONE, OTHER,
        ["prompt", "messages", "score_chosen"],
    ),
    "trl's explicit prompt": ({"prompt": [user("2+1?")], "chosen": ONE[1:], "rejected": OTHER[1:]}, "messages", ONE, OTHER, []),
    "trl's explicit prompt as text": ({"prompt": "2+1?", **SIDES}, "prompt", ONE, OTHER, []),
    "sharegpt": (
        {"conversations": TALK[1:2], "chosen": TALK[2], "rejected": speaks("gpt", "4"), "id": 1}, "sharegpt", ONE, OTHER, ["id"]
    ),
    "sharegpt with one prompt too many": (
        {"conversations": TALK[1:2], "prompt": "Hm?", "chosen": TALK[2], "rejected": speaks("gpt", "4")}, "sharegpt", ONE, OTHER,
        ["prompt"],
    ),
    "sharegpt, whole": ({"chosen": TALK[1:], "rejected": [TALK[1], speaks("gpt", "4")]}, "sharegpt", ONE, OTHER, []),
    "openai's turns": ({"messages": ONE[:1], "chosen": ONE[1], "rejected": OTHER[1]}, "sharegpt", ONE, OTHER, []),
    "hh": (
        {side: f"{DIALOGUE} {text}" for side, text in SIDES.items()}, "hh", [*TURNS, said("3")], [*TURNS, said("4")], []
    ),
    "hh with a prompt": ({"prompt": DIALOGUE, **SIDES}, "hh", [*TURNS, said("3")], [*TURNS, said("4")], []),
    "hh with a prompt without the last mark": (
        {"prompt": "\n\nHuman: 2+1?", "chosen": " 3", "rejected": " 4"}, "hh", ONE, OTHER, []
    ),
    "hh with answers that have the mark": (
        {"prompt": DIALOGUE, "chosen": "\n\nAssistant: 3", "rejected": "\n\nAssistant: 4"}, "hh", [*TURNS, said("3")],
        [*TURNS, said("4")], [],
    ),
    "hh with a prompt that is none": (
        {"prompt": "Hm?", **{side: f"{DIALOGUE} {text}" for side, text in SIDES.items()}}, "hh", [*TURNS, said("3")],
        [*TURNS, said("4")], ["prompt"],
    ),
    "messages before lists of one answer": (
        {"messages": ONE[:1], "chosen": ONE[1:], "rejected": OTHER[1:]}, "sharegpt", ONE, OTHER, []
    ),
    "a prompt before messages": ({"prompt": ONE[:1], "chosen": ONE[1], "rejected": OTHER[1]}, "sharegpt", ONE, OTHER, []),
    "alpaca": ({"instruction": "2+1?", "input": "", **SIDES}, "alpaca", ONE, OTHER, []),
    "alpaca of Dolly's": ({"instruction": "2", "input": "", "context": "1", **SIDES}, "alpaca", [user("2\n1"), ONE[1]],
                          [user("2\n1"), OTHER[1]], []),
    "alpaca with two contexts": ({"instruction": "2", "input": "1", "context": "0", **SIDES}, "alpaca", [user("2\n1"), ONE[1]],
                                 [user("2\n1"), OTHER[1]], ["context"]),
    "ultrafeedback": ({"instruction": "2+1?", "completions": RATED, "source": "x"}, "ultrafeedback", ONE, OTHER, ["source"]),
    "ultrafeedback's texts": (
        {"instruction": "2+1?", "chosen_response": "3", "rejected_response": "4"}, "ultrafeedback", ONE, OTHER, []
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PAIRS)
def test_pairs(name, tokenizer):
    row, form, chosen, rejected, unused = PAIRS[name]
    expected = PairEncoding(tokenizer, "tulu", 100)({"chosen": chosen, "rejected": rejected})
    found = PairEncoding(tokenizer, "tulu", 100)(row)
    assert [one.ids.tolist() for one in found.sequences] == [one.ids.tolist() for one in expected.sequences]
    assert [one.labels.tolist() for one in found.sequences] == [one.labels.tolist() for one in expected.sequences]
    told = {f"column {column}": 1 for column in unused} | ({} if form == "messages" else {f"form {form}": 1})
    assert +found.told == told, "nothing is left out in silence"
    assert PairEncoding(tokenizer, "tulu", 100, form=form)(row).told == found.told


def test_a_pair_of_ratings_is_the_same_each_time_and_ties_are_useless():
    made = [{"response": str(number), "overall_score": score} for number, score in enumerate((3, 5, "5.0", 1, 2))]
    rows = [{"instruction": f"{number}?", "completions": made} for number in range(40)]
    found = {read(row, "pair").row["rejected"][0]["content"] for row in rows}
    assert found == {"0", "3", "4"}, "any that scores less, by lot"
    again = [read({"instruction": "1?", "completions": made}, "pair").row for _ in range(2)]
    assert again[0] == again[1] and again[0]["chosen"] == [said("1")]
    with pytest.raises(Useless, match="all 2 completions have the same score, 5"):
        read({"instruction": "a", "completions": made[1:3]}, "pair")


def test_the_first_form_counts_and_what_is_left_is_told():
    row = {"prompt": "x", "completion": "y", "instruction": "a", "output": "b", "conversations": TALK, "messages": ONE}
    order = [read(row, "conversation")]
    for gone in (["messages"], ["conversations"], ["instruction", "output"]):
        row = {name: value for name, value in row.items() if name not in gone}
        order.append(read(row, "conversation"))
    assert [made.form for made in order] == ["messages", "sharegpt", "alpaca", "prompt"]
    assert order[0].row == {**row, **order[0].row} and "completion" in order[0].row, "other columns stay, to be counted"
    named = read({"messages": ONE, "instruction": "a", "output": "b"}, "conversation", "alpaca")
    assert (named.row["messages"], named.unused) == ([user("a"), said("b")], ("messages",))


REFUSED = [
    ("conversation", {"question": "a", "answer": "b"}, "nearest .* alpaca, .*: rename question to instruction and answer"),
    ("conversation", {"prompt": "a", "answer": "b"}, "nearest form is prompt, .*completion: rename answer to completion"),
    ("conversation", {"instructions": "a", "output": "b"}, "rename instructions to instruction"),
    ("conversation", {"instruction": "a"}, "nearest form is alpaca.*output is missing"),
    ("conversation", {"text": "a"}, "has text; expected messages, or input_ids and labels. Known forms .*sharegpt"),
    ("conversation", {"conversations": TALK[:2], "chosen": TALK[2], "rejected": TALK[2]}, "a pair, which rm and dpo train on"),
    ("conversation", {"conversations": [speaks("narrator", "a")]}, "conversations: message 1 is from 'narrator'.*expected"),
    ("conversation", {"conversations": [speaks("function_call", "{")]}, "function_call with '{'.*expected JSON"),
    ("conversation", {"instruction": "a", "output": None, "response": 3}, "response is 3"),
    ("conversation", {"instruction": ["a"], "output": "b"}, "instruction is .'a'.*expected text"),
    ("conversation", {"instruction": "a", "output": "b", "history": [["a"]]}, "history is .*expected a list of pairs"),
    ("conversation", {"prompt": 3, "completion": "b"}, "prompt is 3"),
    ("conversation", {"conversations": [{**speaks("gpt", "a"), "content": "b"}]}, "message 1 has a value and another content"),
    ("conversation", {"messages": [{**speaks("gpt", "a"), "content": "b"}]}, "message 1 has a value and another content"),
    ("pair", {**SIDES, "prompt": DIALOGUE, "chosen": "\n\nHuman: a\n\nAssistant: b"}, "chosen begins with a dialogue of its own"),
    ("pair", {"prompt": DIALOGUE + " 3", **SIDES}, "chosen answers a prompt that ends with the assistant's turn"),
    ("pair", {"messages": ONE}, "This is a conversation, which sft trains on"),
    ("pair", SIDES, "texts that do not say what they answer"),
    ("pair", {"question": "a", **SIDES}, "nearest form is alpaca.*rename question to instruction"),
    ("pair", {"chosen": TALK[2], "rejected": TALK[2]}, "do not say what they answer; expected conversations"),
    ("pair", {"instruction": "a", "completions": [{"response": "a", "rating": 1}]}, "has 1 completions"),
    ("pair", {"instruction": "a", "completions": [{"response": "a"}, {"response": "b"}]}, "do not all have annotations"),
    ("pair", {"instruction": "a", "completions": [{"rating": 1}, {"rating": 2}]}, "completion 1 has the response None"),
    ("prompt", {"question": "a"}, "nearest form is alpaca|rename question to"),
]


@pytest.mark.parametrize(("kind", "row", "told"), REFUSED)
def test_refusals_name_what_comes_nearest(kind, row, told):
    with pytest.raises(ValueError, match=told):
        read(row, kind)


@pytest.mark.parametrize("row", [{side: [said(text)] for side, text in SIDES.items()}, {
    side: [{"role": "system", "content": "brief"}, said("hello"), said(text)] for side, text in SIDES.items()
}])  # fmt: skip
def test_a_pair_that_answers_nothing_is_refused(row, tokenizer):
    with pytest.raises(ValueError, match="chosen and rejected do not say what they answer"):
        PairEncoding(tokenizer, "tulu", 100)(row)


def test_a_form_that_is_named_is_the_only_one():
    with pytest.raises(ValueError, match=r"has messages; expected instruction and output .*by data.format = 'alpaca'"):
        read({"messages": ONE}, "conversation", "alpaca")
    with pytest.raises(ValueError, match="'hh', which are pairs: rm and dpo train on them; expected one of auto, tokens"):
        read({"messages": ONE}, "conversation", "hh")
    with pytest.raises(ValueError, match=r"chosen is '3' .str.; expected a dialogue that begins with 'Human: '"):
        read(SIDES, "pair", "hh")
    with pytest.raises(ValueError, match=r"rejected is 4 .int.; expected a dialogue"):
        read({"chosen": DIALOGUE, "rejected": 4}, "pair", "hh")
    with pytest.raises(ValueError, match="chosen: messages is '3'"):
        PairEncoding(None, "tulu", 100, form="messages")(SIDES)


@pytest.fixture
def file(tmp_path):
    def written(*rows, name="rows.jsonl"):
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    return written


def test_stores_say_what_forms_rows_had_and_depend_on_the_form(tmp_path, file):
    tokenizer_of(KINDS["Zephyr"].template).save_pretrained(tmp_path / "model")
    mixed = file({"instruction": "a", "output": "b"}, {"conversations": TALK, "lang": "en"}, {"messages": ONE}, {"question": "a"})
    model = ModelSettings(path=str(tmp_path / "model"))
    settings = DataSettings(train=mixed, malformed="reject", workers=1)
    stores = [
        prepare(settings.model_copy(update={"format": form}), model, tmp_path / "store", progress=False)
        for form in ("auto", "alpaca")
    ]
    assert [(len(store), store.dropped) for store in stores] == [(3, 1), (1, 3)]
    assert stores[0].told[:2] == [
        "rows of another form than messages, read by its columns: alpaca (1 rows), sharegpt (1 rows)",
        "columns that are not used: lang (1 rows)",
    ]
    assert stores[0].key != stores[1].key
    rated = file(*({"instruction": "a", "completions": made} for made in (RATED, RATED[:1] * 2)), name="rated.jsonl")
    store = prepare(PreferenceDataSettings(train=rated, workers=1), model, tmp_path / "pairs", progress=False)
    assert (len(store), store.rejected) == (2, {"nothing_to_learn": 1})


def test_prompts_of_any_form_are_asked(file, tokenizer):
    asked = [
        {"prompt": "2+1?"}, {"prompt": [user("2+1?")]}, {"conversations": TALK[1:2]}, {"instruction": "2+1?", "output": "3"}
    ]  # fmt: skip
    rows = load_rows(file(*({**row, "ground_truth": "3", "dataset": "gsm8k"} for row in asked)))
    found = read_prompts(rows, tokenizer, "tulu", 100, "error", lambda row: [])
    assert [prompt.messages for prompt in found.prompts] == [[user("2+1?")]] * 4
    assert found.told == [
        "rows of another form than messages, read by its columns: prompt (2 rows), sharegpt (1 rows), alpaca (1 rows)",
        "columns that are not used: output (1 rows)",
    ]
    with pytest.raises(UserError, match="expected conversations"):
        read_prompts(rows, tokenizer, "tulu", 100, "error", lambda row: [], form="sharegpt")


def test_the_kind_of_rows_is_seen_by_their_form(file):
    for row, stages in [
        (PAIRS["hh"][0], ["rm", "dpo"]),
        (PAIRS["sharegpt"][0], ["rm", "dpo"]),
        (PAIRS["ultrafeedback, binarized"][0], ["sft"]),
        (CONVERSATIONS["alpaca"][0], ["sft"]),
        ({"prompt": "a", "ground_truth": "b", "dataset": "gsm8k"}, ["grpo"]),
        ({"question": "a"}, []),
    ]:
        name = file(row)
        assert stages_of(name) == stages
        settings = DataInspectSettings(model=ModelSettings(path="m"), data=DataSettings(train=name))
        assert of_its_kind(settings).pairs is (stages == ["rm", "dpo"])


def test_decontamination_reads_the_messages_of_any_form():
    assert row_texts(CONVERSATIONS["sharegpt"][0], ["messages"], ["user"]) == ["2+1?"]
    assert row_texts(PAIRS["hh"][0], ["messages"], ["user", "assistant"]).count("+1?") == 2
    assert [message["content"] for message in any_messages(PAIRS["trl's explicit prompt as text"][0])] == ["2+1?", "3", "4"]
    tied = {"instruction": "2+1?", "completions": RATED[:1] * 2}
    assert row_texts(tied, ["messages"], ["user"]) == ["2+1?"]
    with pytest.raises(ValueError, match="has question; expected messages"):
        row_texts({"question": "a"}, ["messages"], ["user"])


@pytest.mark.parametrize(("form", "same"), [("auto", True), ("messages", False)])
def test_runs_of_before_there_were_forms_go_on(form, same):
    settings = SftSettings(model=ModelSettings(path="m"), data=DataSettings(train="a.jsonl", format=form), run_dir="run")
    assert as_before("data.format", {"data.train": "a.jsonl"}, settings) is same
    assert not as_before("data.format", {"data.format": "alpaca"}, settings)
