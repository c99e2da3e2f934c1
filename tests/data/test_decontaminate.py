"""Shared n-grams: found exactly, counted by evaluation, and taken out of the sets that are over the limit."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tulu_mega import cli
from tulu_mega.config import DecontaminateSettings, load
from tulu_mega.data.tools.decontaminate import Matcher, check, decontaminate, opened, row_words
from tulu_mega.data.tools.ngrams import NgramIndex, words
from tulu_mega.errors import UserError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Don't PANIC, 1,000 times: x_1!", "don t panic 1 000 times x_1"),
        ("", ""),
        ("?!\n\t…", ""),
        ("Größe ÉTÉ naïve", "größe été naïve"),
        ("ｆｕｌｌ ﬁle", "full file"),
        ("abc漢字とかなdef", "abc 漢 字 と か な def"),
        ("สวัสดี", "ส ว ั ส ด ี"),
        ("한국어 문장", "한국어 문장"),
        ("_one_ __two__ *three* snake_case", "one two three snake_case"),
        ("co\u00adop ze\u200bro j\u200do\u2060in \ufeffbom sm\ufe0file", "coop zero join bom smile"),
        ("dir\u202aect t\U000e0061ag nu\x00ll", "direct tag null"),
        ("e\u200b\u0301te\u0301", "été"),
        ("one\u00a0two\u2028three\x1cfour\x85five", "one two three four five"),
    ],
)
def test_words(text, expected):
    assert words(text) == expected.split()


def naive(train, evaluation, ngram, threshold):
    """(training row, evaluation row, share) of every pair above the threshold, from the definition."""
    found = []
    for i, texts in enumerate(train):
        grams = {tuple(text[at : at + ngram]) for text in texts for at in range(len(text) - ngram + 1)}
        for j, pieces in enumerate(evaluation):
            covered = 0
            for piece in pieces:
                marked = set()
                for at in range(len(piece) - ngram + 1):
                    if tuple(piece[at : at + ngram]) in grams:
                        marked |= set(range(at, at + ngram))
                covered += len(marked)
            total = sum(map(len, pieces))
            if total and covered / total > threshold:
                found.append((i, j, covered / total))
    return found


some_text = st.lists(st.sampled_from("abc"), max_size=12)
some_rows = st.lists(st.lists(some_text, max_size=3), min_size=1, max_size=5)


@given(some_rows, some_rows, some_rows, st.integers(1, 4), st.sampled_from([0.0, 0.3, 0.5, 0.9]))
@settings(deadline=None, max_examples=200)
def test_found_is_what_the_definition_gives(train, first, second, ngram, threshold):
    matches = Matcher([first, second], ngram, threshold)(train, 100)
    for number, evaluation in enumerate((first, second)):
        found = [
            (match.row - 100, row, share)
            for match in matches
            if match.evaluation == number
            for row, share in zip(match.rows.tolist(), match.shares.tolist(), strict=True)
        ]
        assert sorted(found) == naive(train, evaluation, ngram, threshold)


def test_exactly_half_is_not_enough():
    evaluation = [[[*"abcdefgh", *"12345678"]]]
    assert Matcher([evaluation], 8, 0.5)([[[*"xabcdefghx"]]]) == []
    (match,) = Matcher([evaluation], 8, 0.5)([[[*"xabcdefgh1x"]]])
    assert (match.row, match.rows.tolist(), match.shares.tolist()) == (0, [0], [9 / 16])


def test_equal_hashes_of_other_words_are_no_match(monkeypatch):
    import tulu_mega.data.tools.ngrams as module

    index = NgramIndex([[[*"abcd"]]], 2)
    monkeypatch.setattr(module, "_hashes", lambda stream, at, factors: np.full(len(at), index._hashes[0]))
    first = index._places[0]
    rows = [[[*"dc"]], [[*"abcd"[first : first + 2]]], [[*"ba"]], [[*"zz"]]]
    assert [(row, found.tolist()) for row, found in index.find(rows)] == [(1, [0])]


def test_rows_too_short_are_told_apart():
    index = NgramIndex([[["a"] * 7], [["a"] * 4, ["b"] * 4], [["a"] * 8], [[]]], 8)
    assert index.matchable.tolist() == [False, False, True, False]
    assert [(row, found.tolist()) for row, found in index.find([[], [["a"] * 9], []])] == [(1, [0])]


def test_what_counts_of_a_row():
    row = {
        "messages": [{"role": "user", "content": "One two"}, {"role": "assistant", "content": "three"}],
        "choices": ["a", "b"],
        "text": "x-y",
    }
    assert row_words(row, ["messages"], ["user"]) == [["one", "two"]]
    assert row_words(row, ["messages", "choices", "text"], ["assistant"]) == [["three"], ["a"], ["b"], ["x", "y"]]
    with pytest.raises(ValueError, match="has no field 'question', but messages, choices, text"):
        row_words(row, ["question"], ["user"])
    with pytest.raises(ValueError, match=r"text holds None \(NoneType\); expected text"):
        row_words({"text": None}, ["text"], ["user"])


def sentence(number, length=12):
    return " ".join(f"word{number}x{position}" for position in range(length))


def talk(user, assistant="fine"):
    return {"messages": [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]}


@pytest.fixture
def world(tmp_path):
    """100 evaluation rows of two files; one set holds 3 of the first file, another holds 1, a third none."""
    test, other = tmp_path / "gsm.jsonl", tmp_path / "ifeval.parquet"
    test.write_text("".join(json.dumps({"question": sentence(n), "answer": "7"}) + "\n" for n in range(100)))
    pq.write_table(pa.table({"prompt": [sentence(n) for n in range(1000, 1050)] + ["too short"]}), other)
    dirty, light, clean = tmp_path / "dirty.jsonl", tmp_path / "light.jsonl", tmp_path / "sub" / "dirty.jsonl"
    clean.parent.mkdir()
    rows = [talk(sentence(n)) for n in range(200, 240)]
    rows[5] = talk(f"Please solve this: {sentence(3).upper()}!!")
    rows[6] = talk(sentence(4, 7))  # 7 words of 12 in no n-gram of 8
    rows[7] = {"id": "é", **talk(sentence(9) + " and " + sentence(10))}
    rows[8] = talk("innocent", sentence(11))  # the assistant's words do not count
    dirty.write_text("\n" + "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    light.write_text("".join(json.dumps(talk(sentence(n))) + "\n" for n in (50, 300, 301)))
    clean.write_text("".join(json.dumps(talk(sentence(n))) + "\n" for n in (400, 401)))
    return {
        "train": [str(dirty), str(light), str(clean)],
        "evaluations": {str(test): "question", str(other): ["prompt"]},
        "output": str(tmp_path / "out"),
        "workers": 1,
    }


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_set_over_the_limit_is_cleaned_and_the_others_stay(world, tmp_path, capsys):
    decontaminate(DecontaminateSettings(**world))
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [entry["short"] for entry in report["evaluations"]] == [0, 1]
    dirty, light, clean = report["sets"]
    test = next(iter(world["evaluations"]))
    assert (dirty["rows"], dirty["contaminated"], dirty["action"], dirty["left"]) == (40, 2, "clean", 38)
    assert dirty["evaluations"][test] == {"contaminated": 2, "held": 3, "share": 0.03, "over": True}
    assert (light["action"], light["contaminated"], light["evaluations"][test]["held"], light["use"]) == (
        "keep", 1, 1, world["train"][1],
    )  # fmt: skip
    assert (clean["action"], clean["contaminated"]) == ("keep", 0)
    source = (tmp_path / "dirty.jsonl").read_bytes().splitlines()[1:]
    assert dirty["use"] == str(tmp_path / "out" / "dirty.clean.jsonl")
    assert (tmp_path / "out" / "dirty.clean.jsonl").read_bytes().splitlines() == source[:5] + source[6:7] + source[8:]
    matches = read(tmp_path / "out" / "matches.jsonl")
    assert [(it["source"], it["line"], it["evaluation_line"], it["share"], it["evaluation_rows"]) for it in matches] == [
        (world["train"][0], 7, 4, 1.0, 1),
        (world["train"][0], 9, 10, 1.0, 2),
        (world["train"][1], 1, 51, 1.0, 1),
    ]
    out = capsys.readouterr().out
    assert "3 of 100" in out and "3.00%" in out and "1 rows of" in out
    assert json.loads(out.splitlines()[-1].removeprefix("data.train = ")) == [entry["use"] for entry in report["sets"]]


def test_other_actions_and_limits(world, tmp_path, capsys):
    def sets(**options):
        decontaminate(DecontaminateSettings(**{**world, **options}))
        capsys.readouterr()
        return [
            (it["action"], it["left"], it["use"]) for it in json.loads((tmp_path / "out" / "report.json").read_text())["sets"]
        ]

    names = world["train"]
    assert sets(action="drop") == [("drop", 0, None), ("keep", 3, names[1]), ("keep", 2, names[2])]
    assert sets(action="report") == [("report", 40, names[0]), ("keep", 3, names[1]), ("keep", 2, names[2])]
    assert not list((tmp_path / "out").glob("*.clean.jsonl"))
    assert [it[:2] for it in sets(overlap=0.0)] == [("clean", 38), ("clean", 2), ("keep", 2)]
    assert [it[:2] for it in sets(overlap=0.03)] == [("keep", 40), ("keep", 3), ("keep", 2)]
    # 7 of 12 words of evaluation row 5, and the assistant's answer
    assert [it[1] for it in sets(ngram=7)] == [37, 3, 2]
    assert [it[1] for it in sets(roles=["user", "assistant"])] == [37, 3, 2]


@pytest.mark.slow
def test_worker_processes_find_the_same(world, tmp_path, capsys, monkeypatch):
    dirty = tmp_path / "dirty.jsonl"
    dirty.write_bytes(dirty.read_bytes() * 40)
    decontaminate(DecontaminateSettings(**world))
    alone = [(tmp_path / "out" / name).read_bytes() for name in ("report.json", "matches.jsonl", "dirty.clean.jsonl")]
    decontaminate(DecontaminateSettings(**{**world, "workers": 2}))
    assert [(tmp_path / "out" / name).read_bytes() for name in ("report.json", "matches.jsonl", "dirty.clean.jsonl")] == alone


def test_everything_wrong_is_told(world, tmp_path, capsys):
    with pytest.raises(UserError) as caught:
        decontaminate(DecontaminateSettings(**{**world, "train": ["gone.jsonl"], "evaluations": {"lost.csv": "a"}}))
    assert [problem.split(":")[0] for problem in caught.value.problems] == ["lost.csv", "gone.jsonl"]
    assert "correct evaluations" in caught.value.problems[0] or "not known" in caught.value.problems[0] or caught.value.problems
    test = next(iter(world["evaluations"]))
    with pytest.raises(UserError) as caught:
        decontaminate(DecontaminateSettings(**{**world, "evaluations": {test: "text"}}))
    assert caught.value.problems[0] == f"{test} line 1: has no field 'text', but question, answer"
    assert caught.value.problems[-1] == "... 100 of 100 rows"
    with open(tmp_path / "dirty.jsonl", "a") as file:
        file.write('{"messages": 5}\n{broken\n')
    with pytest.raises(UserError) as caught:
        decontaminate(DecontaminateSettings(**world))
    *rows, summary = caught.value.problems
    assert [problem.split(": ")[0] for problem in rows] == [f"{tmp_path}/dirty.jsonl line {n}" for n in (42, 43)]
    assert summary.startswith("2 of ") and summary.endswith("correct or remove them, or give --malformed reject")
    capsys.readouterr()
    settings = DecontaminateSettings(**{**world, "malformed": "reject"})
    check(settings, *opened(settings))
    decontaminate(settings)
    dirty = json.loads((tmp_path / "out" / "report.json").read_text())["sets"][0]
    assert dirty["unread"] == 2 and dirty["left"] == dirty["rows"] - dirty["contaminated"] - 2
    left = (tmp_path / "out" / "dirty.clean.jsonl").read_text().splitlines()
    assert len(left) == dirty["left"] and all("role" in line for line in left)
    assert "2 rows of" in capsys.readouterr().out
    (tmp_path / "busy").write_text("")
    (tmp_path / "dirty.jsonl").write_text(json.dumps(talk("a")))
    with pytest.raises(UserError, match="cannot be written"):
        decontaminate(DecontaminateSettings(**{**world, "output": str(tmp_path / "busy")}))
    (tmp_path / "a.jsonl").write_text(json.dumps(talk("a")))
    (tmp_path / "a.clean.jsonl").write_text(json.dumps(talk("a")))
    names = [str(tmp_path / "a.jsonl"), str(tmp_path / "a.clean.jsonl")]
    with pytest.raises(UserError, match="itself among the training files"):
        decontaminate(DecontaminateSettings(**{**world, "train": names, "output": str(tmp_path)}))
    with pytest.raises(UserError, match="evaluations: no evaluation"):
        load(DecontaminateSettings, None, ["--train", "a", "--output", "b", "--evaluations", "{}"])


def test_from_the_command_line(world, tmp_path, capsys):
    evaluations = ", ".join(f"{json.dumps(name)} = {json.dumps(fields)}" for name, fields in world["evaluations"].items())
    argv = ["data", "decontaminate", "--train", json.dumps(world["train"]), "--evaluations", f"{{{evaluations}}}"]
    assert cli.main([*argv, "--output", world["output"], "--workers", "1"]) == 0
    assert "dirty.clean.jsonl" in capsys.readouterr().out
