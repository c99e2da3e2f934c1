"""What `data inspect` and `data mix` show and write is what is there."""

import html
import io
import json
import re

import pytest
from rich.console import Console

from tulu_mega import cli
from tulu_mega.config import DataInspectSettings, DataMixSettings, DataSettings, PreferenceDataSettings, SftSettings, load
from tulu_mega.data.prepare import prepare
from tulu_mega.data.tools.inspect import look
from tulu_mega.data.tools.inspect_views import print_inspection, write_page
from tulu_mega.data.tools.row_kind import of_its_kind
from tulu_mega.errors import UserError
from tulu_mega.layout.alignment import alignment
from tulu_mega.layout.packing_rules import pack_alignment, pipeline_of

EOS = "<|end_of_text|>"
CONFIG = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "intermediate_size": 128,
    "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 320,
}  # fmt: skip


def talk(user, assistant):
    return {"messages": [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]}


@pytest.fixture
def run(tmp_path, tokenizer_dir):
    """Flags of a run over two files, of which one holds rows that cannot be used."""
    (tokenizer_dir / "config.json").write_text(json.dumps(CONFIG))
    a, b = tmp_path / "a.jsonl", tmp_path / "b[1].jsonl"
    a.write_text("".join(json.dumps(talk(f"<b>hi {n}</b>", "é😀 & [red]ok[/red]\n" * (n + 1))) + "\n" for n in range(8)))
    b.write_text(json.dumps(talk("x" * 300, "late")) + "\n{broken\n" + json.dumps(talk("y", "z" * 300)) + "\n")
    return {
        "model": str(tokenizer_dir),
        "data.train": json.dumps({str(a): 1.5, str(b): 3}).replace('": ', '" = '),
        "data.max_length": "256",
        "data.malformed": "reject",
        "train.global_batch": "4",
        "train.epochs": "1.0",
        "rows": "13",
    }


def flags(run):
    return [part for name, value in run.items() for part in (f"--{name}", value)]


@pytest.fixture
def found(run, tmp_path):
    settings = load(DataInspectSettings, None, flags(run))
    store = prepare(settings.data, settings.model, tmp_path / "store", progress=False)
    return look(settings, store, CONFIG)


def test_figures(found, tmp_path):
    a, b = found.sources
    assert (a["rows"], a["amount"], a["drawn"], a["used"]) == (8, 1.5, 12, 12)
    assert (b["rows"], b["amount"], b["drawn"], b["used"]) == (3, 3, 3, 1)
    assert found.rejected == {"nothing_to_train": 1, "malformed": 1}
    assert [it.line for it in found.rejects] == [1, 2]
    assert found.lengths.rows == 13 == sum(rows for _, _, rows in found.lengths.histogram)
    assert found.lengths.tokens == a["tokens"] + b["tokens"] == sum(it.tokens for it in found.samples)
    assert found.lengths.trained == sum(it.trained for it in found.samples)
    assert found.lengths.quantiles["most"] == 256 and found.lengths.histogram[-1][1] == 256
    assert found.truncated == sum(it.cut > 0 for it in found.samples) and found.cut == sum(it.cut for it in found.samples)
    packing = found.packing
    assert (packing.steps, packing.sampled) == (4, 4)
    assert packing.padding == (0.0, 0.0)  # one rank needs none
    assert packing.sequences * packing.micro_batches[1] * packing.steps == pytest.approx(13)


def test_a_row_in_pieces(found, tmp_path):
    sample = next(it for it in found.samples if it.where == f"{tmp_path}/a.jsonl line 1")
    answer = "é😀 & [red]ok[/red]\n"
    assert sample.pieces == [("<|user|>\n<b>hi 0</b>\n<|assistant|>\n", False), (answer + EOS, True)]
    assert sample.trained == len(answer.encode()) + 1 and sample.cut == 0


def test_the_layout_is_what_a_run_would_have(run, tmp_path):
    wide = {"parallel.tensor": "2", "parallel.pipeline": "2", "parallel.data": "2", "train.micro_batches": "3"}
    settings = load(DataInspectSettings, None, flags({**run, **wide}))
    store = prepare(settings.data, settings.model, tmp_path / "store", progress=False)
    packing = look(settings, store, CONFIG).packing
    assert packing.layout == "data 2 · tensor 2 · pipeline 2 · context 1"
    assert packing.micro_batches == (3, 3.0, 3)
    assert 0 < packing.padding[0] <= packing.padding[1] < 1 and 0 < packing.balance[1] <= packing.balance[0] < 1
    assert pack_alignment(settings) == alignment(2, True, 1)
    fp8 = load(DataInspectSettings, None, flags({**run, **wide, "precision": "blockwise"}))
    assert pack_alignment(fp8) == alignment(2, True, 1, "blockwise")
    assert pipeline_of(CONFIG, settings).ranks == 2
    with pytest.raises(UserError, match=r"train\.micro_batches"):
        tight = load(DataInspectSettings, None, flags({**run, "train.micro_batches": "1"}))
        look(tight, store, CONFIG)


@pytest.mark.parametrize("colour", [False, True])
def test_the_terminal(found, colour):
    out = io.StringIO()
    print_inspection(
        found, Console(file=out, force_terminal=colour, color_system="truecolor" if colour else None, width=400, highlight=False)
    )
    text = out.getvalue()
    assert "b[1].jsonl" in text and "[red]ok[/red]" in text and "1 malformed" in text and "not valid JSON" in text
    if colour:
        assert "\x1b[30;42mé😀 & " in text
    else:
        assert f"⟦é😀 & [red]ok[/red]\n{EOS}⟧" in text
        assert "\x1b" not in text
    assert text.count("█") > 20


def test_the_page_stands_alone_and_says_the_same(found, tmp_path):
    write_page(found, tmp_path / "deep" / "page.html")
    page = (tmp_path / "deep" / "page.html").read_text()
    assert not re.search(r"(src|href)=|https?://|<script|url\(", page)
    marked = [html.unescape(text) for text in re.findall(r"<mark>(.*?)</mark>", page, re.DOTALL)][1:]
    assert marked == [text for it in found.samples for text, trained in it.pieces if trained]
    assert "&lt;b&gt;hi 0&lt;/b&gt;" in page and "<b>" not in page
    assert page.count('class="bar"') == sum(rows > 0 for _, _, rows in found.lengths.histogram)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"html = .*cannot be written"):
        write_page(found, tmp_path / "file" / "page.html")


def test_from_the_command_line(run, tmp_path, capsys):
    page = tmp_path / "page.html"
    assert cli.main(["data", "inspect", *flags(run), "--html", str(page), "--rows", "2"]) == 0
    assert "13 used, 2 not used" in capsys.readouterr().out
    assert page.read_text().count('<section class="row">') == 2
    assert not list(tmp_path.glob("**/tokens.npy"))
    assert cli.main(["data", "inspect", "--help"]) == 0 and "--html" in capsys.readouterr().out
    assert cli.main(["data"]) == 2 and "inspect, mix, decontaminate" in capsys.readouterr().err


def test_a_mixture_as_a_file(run, tmp_path, capsys):
    output = tmp_path / "mixed.jsonl"
    file = tmp_path / "sft.toml"
    train = run["data.train"].replace("= 3", "= 1")  # the draw of one row leaves the broken one out
    file.write_text(f'model = "m"\nrun_dir = "r"\n[train]\nepochs = 1.0\n[data]\nseed = 1\ntrain = {train}\n')
    assert cli.main(["data", "mix", str(file), "--output", str(output)]) == 0
    assert "13 rows" in capsys.readouterr().out
    lines = output.read_bytes().splitlines()
    source = (tmp_path / "a.jsonl").read_bytes().splitlines()
    assert lines[:8] == source and len(lines) == 13 and set(lines[8:12]) < set(source)
    written = json.loads((tmp_path / "mixed.jsonl.sources.json").read_text())
    assert written["seed"] == 1 and [it["drawn"] for it in written["sources"]] == [12, 1]
    before = output.read_bytes()
    file.write_text(f"[data]\ntrain = {run['data.train']}\n")
    assert cli.main(["data", "mix", str(file), "--output", str(output)]) == 2
    assert "b[1].jsonl line 2: not valid JSON" in capsys.readouterr().err
    assert output.read_bytes() == before and not list(tmp_path.glob(".*partial"))
    with pytest.raises(UserError, match=r"data\.trian: unknown setting"):
        load(DataMixSettings, None, ["--data.trian", "x", "--data.train", "y", "--output", "z"])


def test_shares_of_the_settings_with_a_run():
    of_a_run = {"model": "m", "data": {"train": "x"}, "run_dir": "r", "optim": {"lr": "any"}, "seed": 7}
    assert DataInspectSettings.model_validate(of_a_run) == DataInspectSettings(model="m", data=DataSettings(train="x"), seed=7)
    assert DataInspectSettings(model="m", data=DataSettings(train="x")).seed == SftSettings.model_fields["seed"].default


@pytest.mark.parametrize(
    ("named", "value"),
    [("--pairs", "true"), ("--preference.beta", "5.0"), ("--data.turns", "last"), ("--heldout", "others.jsonl")],
)
def test_pairs_are_shown_side_by_side(run, tmp_path, capsys, named, value):
    """They are known by the settings that only pairs have, or by what they are."""
    rows = [{side: talk("q", side[0] * n)["messages"] for side in ("chosen", "rejected")} for n in (1, 2, 3)]
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ["--model", run["model"], "--data.train", str(file), "--train.global_batch", "2", "--rows", "2", named, value]
    assert cli.main(["data", "inspect", *arguments]) == 0
    shown = capsys.readouterr().out
    for line, side, text in ((1, "chosen", "c"), (1, "rejected", "r"), (3, "chosen", "ccc"), (3, "rejected", "rrr")):
        assert f"line {line}, {side}" in shown and f"⟦{text}{EOS}⟧" in shown
    assert re.search(r"rows +3 used", shown)


def test_rows_to_evaluate_on_do_not_make_conversations_pairs(run, capsys):
    assert cli.main(["data", "inspect", *flags(run), "--heldout", "others.jsonl"]) == 0
    assert "chosen" not in capsys.readouterr().out


def test_what_a_row_is(tmp_path):
    messages, talked = [{"role": "user", "content": "q"}], {"input_ids": [1], "labels": [1]}
    pair = {"chosen": messages, "rejected": messages}
    tokens = {f"{side}_{what}": [1] for side in ("chosen", "rejected") for what in ("input_ids", "labels")}
    file = tmp_path / "rows.jsonl"
    for row, expected in (
        (pair, True),
        (tokens, True),
        (talked, False),
        (pair | {"messages": messages}, False),
        ({"a": 1}, False),
    ):
        file.write_text("{broken\n" + json.dumps(row) + "\n")
        found = of_its_kind(DataMixSettings(data=DataSettings(train=[str(file), "gone.jsonl"], max_length=9), output="x"))
        assert (found.pairs, isinstance(found.data, PreferenceDataSettings), found.data.max_length) == (expected, expected, 9)
    said = DataMixSettings.model_validate({"data": {"train": str(file)}, "output": "x", "pairs": False, "preference": {}})
    assert of_its_kind(said) == said
    assert of_its_kind(DataMixSettings(data=DataSettings(train="gone.jsonl"), output="x")).pairs is False


def test_pairs_of_a_table_are_mixed_as_they_are(tmp_path):
    import pyarrow
    from pyarrow import parquet

    sides = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    parquet.write_table(pyarrow.Table.from_pylist([{"chosen": sides, "rejected": sides}]), tmp_path / "pairs.parquet")
    output = tmp_path / "mixed.jsonl"
    assert cli.main(["data", "mix", "--data.train", str(tmp_path / "pairs.parquet"), "--output", str(output)]) == 0
    assert json.loads(output.read_text()) == {"chosen": sides, "rejected": sides}
