"""Rows to sequences: pairs with a prompt of their own, tokens with padding, labels, what is told of rows."""

from __future__ import annotations

import json

import pytest

from tests.lib.chat_templates import KINDS, tokenizer_of
from tulu_mega.config import DataSettings, ModelSettings, PreferenceDataSettings
from tulu_mega.data.encoding import ConversationEncoding, PairEncoding
from tulu_mega.data.prepare import prepare
from tulu_mega.errors import UserError
from tulu_mega.preflight import check as preflight
from tulu_mega.preflight.findings import Findings, Rows
from tulu_mega.records import IGNORE

ASKED = [{"role": "user", "content": "How many?"}]
SIDES = {side: [{"role": "assistant", "content": text}] for side, text in (("chosen", "3"), ("rejected", "4"))}
WHOLE = {side: ASKED + answer for side, answer in SIDES.items()}


def pair(tokenizer, row):
    return PairEncoding(tokenizer, "tulu", 100)(row)


@pytest.mark.parametrize("prompt", [ASKED, "How many?", [{"role": "system", "content": "brief"}, *ASKED]])
def test_a_prompt_of_its_own_comes_before_both_sides(tokenizer, prompt):
    begin = prompt if isinstance(prompt, list) else ASKED
    expected = pair(tokenizer, {side: begin + answer for side, answer in SIDES.items()})
    found = pair(tokenizer, {"prompt": prompt, **SIDES})
    assert [one.ids.tolist() for one in found.sequences] == [one.ids.tolist() for one in expected.sequences]
    assert [one.labels.tolist() for one in found.sequences] == [one.labels.tolist() for one in expected.sequences]
    assert not +found.told, "nothing is left out"


def test_a_prompt_that_both_sides_hold_is_not_put_there_twice(tokenizer):
    expected = pair(tokenizer, WHOLE).sequences
    for prompt, told in ((ASKED, 0), ("How many?", 1)):
        found = pair(tokenizer, {"prompt": prompt, **WHOLE})
        assert [one.ids.tolist() for one in found.sequences] == [one.ids.tolist() for one in expected]
        assert found.told["column prompt"] == told


def test_prompts_that_cannot_come_before(tokenizer):
    for prompt, told in ((7, "prompt is 7"), ([*ASKED, *SIDES["chosen"]], "last message of prompt is the assistant's")):
        with pytest.raises(ValueError, match=told):
            pair(tokenizer, {"prompt": prompt, **SIDES})
    with pytest.raises(ValueError, match="the system column and the system message"):
        pair(tokenizer, {"prompt": [{"role": "system", "content": "brief"}, *ASKED], "system": "long", **SIDES})


def test_a_side_with_another_prompt_than_the_rows_is_refused(tokenizer):
    """It would be asked twice."""
    asked = [{"role": "user", "content": "2+1?"}]
    sides = [[*asked, {"role": "assistant", "content": answer}] for answer in ("3", "4")]
    row = {"prompt": [{"role": "system", "content": "brief"}, *asked], "chosen": sides[0], "rejected": sides[1]}
    with pytest.raises(ValueError, match="begins with a prompt of its own"):
        pair(tokenizer, row)


def tokens(row):
    made = ConversationEncoding(None, "tulu", 100)(row)
    return made.sequences[0].ids.tolist(), made.sequences[0].labels.tolist(), made.told


def test_padding_is_left_out():
    row = {"input_ids": [1, 1, 20, 21, 0], "labels": [IGNORE, IGNORE, IGNORE, 21, 0], "attention_mask": [0, 0, 1, 1, 0]}
    assert tokens(row) == ([20, 21], [IGNORE, 21], {"padding": 1})
    assert tokens({**row, "attention_mask": [True] * 5, "labels": [IGNORE, 1, 20, 21, 0]})[0] == row["input_ids"]
    assert tokens({**row, "attention_mask": [0.0, 0.0, 1.0, 1.0, 0.0]})[0] == [20, 21], "as pandas writes it"
    both = {f"{side}_{name}": values for side in ("chosen", "rejected") for name, values in row.items()}
    with pytest.raises(Exception, match="are the same"):
        PairEncoding(None, "tulu", 100)(both)
    one = PairEncoding(None, "tulu", 100)({**both, "rejected_attention_mask": [1] * 5, "rejected_labels": [IGNORE] * 4 + [0]})
    assert [made.ids.tolist() for made in one.sequences] == [[20, 21], row["input_ids"]]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"attention_mask": [0, 1, 0, 1]}, "0 between tokens"),
        ({"attention_mask": [0, 0, 0, 0]}, "0 throughout"),
        ({"attention_mask": [1, 1, 1]}, "expected 4 values"),
        ({"attention_mask": [1, 1, 2, 2]}, "of 0 or 1"),
        ({"labels": [21, 22, 23, IGNORE]}, r"labels\[0\] is 21, but input_ids\[0\] is 20: they are the next tokens"),
        ({"labels": [IGNORE, 22, 23, IGNORE]}, "shifted already"),
        ({"labels": [20, 21, 7, 23]}, r"labels\[2\] is 7.*expected its token"),
    ],
)
def test_masks_and_labels_of_another_form_are_refused(changes, told):
    with pytest.raises(ValueError, match=told):
        tokens({"input_ids": [20, 21, 22, 23], "labels": [20, 21, 22, 23], **changes})


@pytest.fixture
def told(tmp_path):
    """Prepares rows under a template, and gives the store."""

    def prepared(rows, template, kind=DataSettings, data_template="auto", **options):
        tokenizer_of(template).save_pretrained(tmp_path / "model")
        options = {"template": data_template, **options}
        file = tmp_path / "rows.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        data = kind(train=str(file), **{"workers": 1, "malformed": "reject", **options})
        return prepare(data, ModelSettings(path=str(tmp_path / "model")), tmp_path / "store", progress=False)

    return prepared


def test_what_is_not_used_is_counted(told):
    row = {"messages": [{**ASKED[0], "id": 3}, *SIDES["chosen"]], "source": "here", "empty": None}
    store = told([row, row, {"messages": WHOLE["chosen"]}], KINDS["Zephyr"].template)
    assert store.told == [
        "columns that are not used: source (2 rows)",
        "fields of messages that the chat template does not use: id (2 rows)",
    ]
    assert store.template == "tokenizer", "what the tokenizer ships is the default"


def test_turns_that_are_written_otherwise_later_are_rows_of_their_own_or_left(told):
    thought = [{"role": "assistant", "content": f"<think>\n{n}\n</think>\n\nSo {n}."} for n in range(2)]
    rows = [{"messages": [*ASKED, thought[0], *ASKED, thought[1]]}, {"messages": [*ASKED, thought[1]]}]
    store = told(rows, KINDS["Qwen 3"].template)
    assert (len(store), store.dropped, store.origins[:, 1].tolist()) == (3, 0, [1, 1, 2])
    assert "1 turns of the assistant in 1 rows" in store.told[0] and "rows of their own" in store.told[0]
    kept = told(rows, KINDS["Qwen 3"].template, rewritten="leave")
    assert len(kept) == 2 and "are not trained" in kept.told[0]
    assert store.key != kept.key
    pairs = told([{"chosen": rows[0]["messages"], "rejected": [*rows[0]["messages"][:-1], thought[0]]}],
                 KINDS["Qwen 3"].template, PreferenceDataSettings)  # fmt: skip
    assert len(pairs) == 2 and "are not trained" in pairs.told[0]


def test_ends_are_told_and_kept(told, tmp_path):
    chatml, rows = KINDS["ChatML"].template, [{"messages": WHOLE["chosen"]}]
    store = told(rows, chatml)
    assert store.ends == tokenizer_of(chatml).convert_tokens_to_ids(["<|im_end|>"])
    assert "turns end in '<|im_end|>', not in the tokenizer's eos token" in store.told[0]
    unmarked = told(
        rows,
        KINDS["ChatML, marked"].template.replace(
            "+ '<|im_end|>' }}{% endgeneration %}{{ '", "}}{% endgeneration %}{{ '<|im_end|>"
        ),
    )
    assert unmarked.ends == [] and "no end of turn is trained" in unmarked.told[0]
    text = told(rows, chatml.replace("<|im_", "<|IM_"))
    assert text.ends == [] and "tokens of text" in text.told[0]
    endless = told(rows, "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}")
    assert endless.ends == [] and any("writes none" in line for line in endless.told)
    assert told(rows, KINDS["Zephyr"].template).told == [] and told(rows, chatml, data_template="tulu").told == []


def test_a_row_that_a_template_refuses_is_a_malformed_row(told):
    good = {"messages": WHOLE["chosen"]}
    store = told([{"system": "brief", **good}, good], KINDS["Gemma"].template)
    assert (len(store), store.rejected) == (1, {"malformed": 1})
    with pytest.raises(UserError, match=r"rows.jsonl line 1: .*refuses this conversation: System role not supported"):
        told([{"system": "brief", **good}, good], KINDS["Gemma"].template, malformed="error")
    with pytest.raises(UserError, match=r"none of the 2 rows can be used \(2 malformed; .*The first: .*TypeError"):
        told([good, good], "{{ tools | length }}" + KINDS["ChatML"].template)


def test_check_and_a_start_tell_it(tmp_path, monkeypatch, capsys):
    tokenizer_of(KINDS["ChatML"].template).save_pretrained(tmp_path / "model")
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": WHOLE["chosen"], "source": "here"}) + "\n")
    data, model = DataSettings(train=str(tmp_path / "rows.jsonl")), ModelSettings(path=str(tmp_path / "model"))

    def found(*_: object, **__: object) -> Findings:
        return Findings(rows=[Rows("data.train", data, model, tmp_path / "run/data")])

    monkeypatch.setattr(preflight, "findings_of", found)
    assert preflight.check(None, tell=lambda line: print(f"# {line}")) == [] and not (tmp_path / "run").exists()
    said = capsys.readouterr().out
    assert "# data.train: columns that are not used: source (1 rows)\n# data.train: turns end in '<|im_end|>'" in said
    preflight.ready(None)
    assert said.replace("# ", "") in capsys.readouterr().err
