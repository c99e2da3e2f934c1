"""A report of runs: what is read, what is drawn, and a page that needs nothing from elsewhere."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tulu_mega import cli
from tulu_mega.errors import UserError
from tulu_mega.report import report
from tulu_mega.report.curves import _COLOURS, CHARTS, draw
from tulu_mega.report.read import read_runs
from tulu_mega.report.settings import ReportSettings

pytest.importorskip("matplotlib")


def step(number: int, **values) -> dict:
    seconds = {"seconds_data": 0.1, "seconds_forward_backward": 0.7, "seconds_optimizer": 0.2, "seconds_checkpoint": 0.0}
    row = {"step": number, "loss": 5 / number, "grad_norm": 2.0, "lr": 1e-3, "tokens": 100, "tokens_per_second": 100.0}
    return {
        **row,
        "supervised_tokens": 50,
        "padding": 0.25,
        "mfu": None,
        "memory_gib": 1.5,
        "skipped_steps": 0,
        **seconds,
        **values,
    }


def make(directory: Path, steps: list, config: dict | None = None, tail: str = "") -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    lines = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in steps)
    (directory / "metrics.jsonl").write_text(lines + tail, encoding="utf-8")
    if config is not None:
        (directory / "config.json").write_text(json.dumps(config))
    return directory


def evaluated(directory: Path, response: str = "It is 4.") -> None:
    (directory / "eval/samples").mkdir(parents=True)
    metric = {"value": 0.5, "low": 0.25, "high": 0.75, "interval": "wilson"}
    task = {"title": "GSM8K", "metrics": {"exact_match": metric}, "problems": 8, "cut_off": 1}
    (directory / "eval/results.json").write_text(json.dumps({"tasks": {"gsm8k": task}}))
    messages = [{"role": "user", "content": "2+2?"}]
    answers = [{"response": response, "finish_reason": "stop", "scores": {"exact_match": 1.0}, "detail": "last number 4"}]
    record = {"key": "k", "problem": 0, "messages": messages, "answer": "4", "responses": answers}
    (directory / "eval/samples/gsm8k.jsonl").write_text(json.dumps(record) + "\n{torn")


class Page(HTMLParser):
    """Collects what a page refers to and shows."""

    def __init__(self, text: str):
        super().__init__()
        self.links, self.pictures, self.text, self.tags = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href", "srcset", "action", "data")]
        if tag == "img":
            self.pictures.append(attributes)

    def handle_data(self, data):
        self.text.append(data.strip())

    def shows(self, *cells: str) -> bool:
        """Whether the texts stand one behind the other."""
        texts = [text for text in self.text if text]
        return any(texts[at : at + len(cells)] == list(cells) for at in range(len(texts)))


def made(*runs: Path, **values) -> Page:
    report.run(ReportSettings(runs=[str(run) for run in runs], **values))
    directory = Path(values["output"]) if "output" in values else runs[0]
    return Page((directory / "report.html").read_text(encoding="utf-8"))


def test_a_run_becomes_pictures_and_one_page_that_asks_nobody(tmp_path):
    run = make(
        tmp_path / "sft", [step(number) for number in range(1, 81)], {"seed": 1, "optim": {"lr": 0.5, "betas": [0.9, 0.99]}}
    )
    evaluated(run)
    page = made(run)
    pictures = {file.name: file.read_bytes() for file in (run / "report").iterdir()}
    names = {"loss.png", "grad_norm.png", "lr.png", "throughput.png", "padding.png", "time.png", "memory.png"}
    assert set(pictures) == names, "no MFU where the peak is unknown, no skipped steps where there were none"
    assert all(data.startswith(b"\x89PNG") for data in pictures.values())
    assert len(page.pictures) == len(names)
    assert page.links and all(link.startswith("data:") for link in page.links)
    text = (run / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"https?://|@import|url\(|<script", text)
    assert page.shows("steps", "80") and page.shows("tokens", "8,000") and page.shows("padding", "25.0 %")
    assert page.shows("time", "1 min 20 s") and page.shows("MFU", "–")
    assert page.shows("optim.lr", "0.5") and page.shows("optim.betas", "[0.9, 0.99]")
    assert page.shows("GSM8K", "exact match", "50.0%", "25.0% to 75.0%", "8", "1")
    assert page.shows("eval, GSM8K, problem 1: right", "Question", "2+2?", "Response", "It is 4.")


def test_what_saves_took_is_drawn_and_told(tmp_path):
    saved = {"save_seconds": 2.0, "save_waited_seconds": 1.0, "save_memory_gib": 0.25}
    steps = [step(1), step(2, **saved), step(3), step(4, **saved | {"save_memory_gib": 0.5})]
    page = made(make(tmp_path / "sft", steps, {"seed": 1}))
    assert page.shows("a save", "2.0 s, 0.50 GiB") and page.shows("time", "4 s")
    assert {"save_memory.png", "save_seconds.png"} <= {file.name for file in (tmp_path / "sft/report").iterdir()}


def test_every_picture_is_told_in_words_and_every_table_has_headings(tmp_path):
    page = made(make(tmp_path / "sft", [step(1), step(2)], {"seed": 1}))
    (loss,) = [picture["alt"] for picture in page.pictures if picture["alt"].startswith("Loss")]
    assert loss == "Loss (as the recipe reduces it). sft: 5 at step 1, 2.5 at step 2, lowest 2.5, highest 5."
    text = (tmp_path / "sft/report.html").read_text(encoding="utf-8")
    assert '<html lang="en">' in text and 'name="viewport"' in text and 'scope="row"' in text


def test_runs_are_overlaid_and_their_differences_listed(tmp_path):
    first = make(tmp_path / "a/sft", [step(1), step(2)], {"seed": 1, "optim": {"lr": 0.5}})
    second = make(tmp_path / "b/sft", [step(1), step(2), step(3)], {"seed": 1, "optim": {"lr": 0.25}})
    page = made(first, second, output=str(tmp_path / "out"))
    assert (tmp_path / "out/report/loss.png").is_file() and not (first / "report.html").exists()
    assert page.shows("run", "a/sft", "b/sft") and page.shows("steps", "2", "3")
    assert page.shows("Where the runs differ", "setting", "a/sft", "b/sft", "optim.lr", "0.5", "0.25")
    (loss,) = [picture["alt"] for picture in page.pictures if picture["alt"].startswith("Loss")]
    assert "a/sft: 5 at step 1" in loss and "b/sft: 5 at step 1, 1.667 at step 3" in loss


def test_what_a_model_says_cannot_become_part_of_the_page(tmp_path):
    run = make(tmp_path / "<b>sft", [step(1)])
    evaluated(run, response="<script>alert(1)</script><img src=http://elsewhere>")
    page = made(run)
    assert "script" not in page.tags and len(page.pictures) == 7
    assert any("<script>alert(1)</script>" in text for text in page.text)


def test_torn_lines_and_values_that_are_no_numbers_leave_gaps(tmp_path, capsys):
    steps = [step(1), "garbage", step(2, loss="NaN", skipped_steps=1), "[1]", step(3, skipped_steps=1), step(3, loss=9.0)]
    run = make(tmp_path / "sft", steps, tail='{"step": 4, "lo')
    (run / "config.json").write_text("{torn")
    (read,) = read_runs([str(run)], 3)
    assert read.column("loss") == ([1, 3], [5.0, 9.0]), "a step written twice is the later one"
    assert "skipped" in {drawing.chart.name for drawing in draw([read])}
    page = made(run)
    warnings = capsys.readouterr().err
    assert "3 torn or foreign lines left out" in warnings and "config.json: not readable" in warnings
    assert any("3 torn or foreign lines" in text for text in page.text) and page.shows("steps", "3")


def test_a_metric_that_only_one_recipe_reports_is_drawn_too(tmp_path):
    run = make(tmp_path / "dpo", [step(1, **{"rewards/margin": 0.1}), step(2, **{"rewards/margin": 0.2})])
    page = made(run)
    assert (run / "report/rewards_margin.png").is_file()
    assert any(picture["alt"].startswith("Rewards/margin") for picture in page.pictures)


def test_what_never_changes_is_told_instead_of_drawn(tmp_path):
    steps = [step(number, clip_high=0.0, ratio=1.0, refills=number % 2) for number in (1, 2, 3)]
    run = make(tmp_path / "grpo", steps)
    page = made(run)
    assert "Never changed: skipped steps 0, clip high 0, ratio 1." in page.text
    assert (run / "report/refills.png").is_file() and not (run / "report/ratio.png").exists()
    made(make(tmp_path / "once", [step(1, ratio=1.0)]))
    assert (tmp_path / "once/report/ratio.png").is_file(), "one value does not say whether it changes"


def test_what_is_as_usual_is_drawn_only_where_some_run_differs(tmp_path):
    unpadded = make(tmp_path / "a", [step(number, padding=0.0, schedule_efficiency=1.0) for number in (1, 2)])
    padded = make(tmp_path / "b", [step(1, padding=0.0, schedule_efficiency=0.99), step(2)])
    page = made(unpadded)
    assert "Never changed: padding 0, schedule efficiency 1, skipped steps 0." in page.text
    assert not {"padding.png", "schedule.png"} & {file.name for file in (unpadded / "report").iterdir()}
    page = made(unpadded, padded, output=str(tmp_path / "out"))
    assert "Never changed: skipped steps 0." in page.text and (tmp_path / "out/report/padding.png").is_file()
    (schedule,) = [picture["alt"] for picture in page.pictures if picture["alt"].startswith("Schedule efficiency (%")]
    assert "100 at step 1" in schedule and "99 at step 1" in schedule


def test_every_part_of_a_chart_has_a_colour():
    assert max(len(chart.columns) for chart in CHARTS) <= len(_COLOURS)


def test_time_is_all_that_a_step_took(tmp_path):
    steps = [step(number, seconds_generation=3.0, seconds_evaluation=60.0 if number == 2 else 0.0) for number in (1, 2)]
    page = made(make(tmp_path / "grpo", steps))
    assert page.shows("time", "1 min 8 s")
    (time,) = [picture["alt"] for picture in page.pictures if picture["alt"].startswith("Where the time went")]
    assert "(s a step)" in time and "4 at step 1" in time and "64 at step 2" in time  # not 64,000 ms
    page = made(make(tmp_path / "short", [step(1), step(2)]))
    (time,) = [picture["alt"] for picture in page.pictures if picture["alt"].startswith("Where the time went")]
    assert "(ms a step)" in time and "1000 at step 1" in time


def test_losses_of_two_kinds_have_an_axis_each(tmp_path):
    """A summed loss of sft in the hundreds makes dpo's, from .69 down, a line at the bottom."""
    runs = [
        make(tmp_path / "sft", [step(1), step(2)], {"train": {"reduction": "sum"}}),
        make(tmp_path / "mean", [step(1), step(2)], {"train": {"reduction": "token_mean"}}),
        make(tmp_path / "dpo", [step(1, margin=0.1), step(2, margin=0.2)], {"preference": {"loss": "simpo"}}),
        make(tmp_path / "rm", [step(1, margin=1.0), step(2, margin=2.0)], {}),
        make(tmp_path / "again", [step(1, margin=1.5), step(2, margin=2.0)], {}),
        make(tmp_path / "grpo", [step(1, reward=0.5), step(2)], {"policy": {"loss": "grpo"}}),
    ]
    page = made(*runs, output=str(tmp_path / "out"))
    told = {picture["alt"].split(" (")[0].split(".")[0]: picture["alt"] for picture in page.pictures}
    titles = ("Loss: sft", "Loss: dpo", "Loss: rm", "Loss: grpo", "Margin: dpo", "Margin: rm")
    assert set(titles) <= set(told) and "Loss" not in told
    assert "again: 1.5" in told["Margin: rm"] and "again" not in told["Margin: dpo"] and "Learning rate" in told
    files = {file.name for file in (tmp_path / "out/report").iterdir()}
    assert {"loss_sft.png", "loss_sft_token_mean_.png", "loss_dpo_simpo_.png"} <= files


def test_a_loss_fills_its_chart_and_amounts_begin_at_0(tmp_path):
    from tulu_mega.report.curves import _dress

    ranges = {}
    for name, values in (("heldout_loss", [2.3, 2.25, 2.2]), ("throughput", [2.3, 2.25, 2.2]), ("loss", [2.3, 2.3, 2.3 + 1e-9])):
        from matplotlib.figure import Figure

        axes = Figure().subplots()
        axes.plot(values)
        _dress(axes, next(chart for chart in CHARTS if chart.name == name), legend=False)
        ranges[name] = axes.get_ylim()
    assert ranges["heldout_loss"][0] > 2.19 and ranges["heldout_loss"][1] < 2.31
    assert ranges["throughput"][0] == 0 and 0.01 < ranges["loss"][1] - ranges["loss"][0] < 0.05


def test_long_runs_are_drawn_quickly(tmp_path):
    import time

    run = make(tmp_path / "long", [step(number) for number in range(1, 20_001)])
    began = time.monotonic()
    made(run)
    assert time.monotonic() - began < 60
    assert (run / "report.html").stat().st_size < 2_000_000


def test_runs_that_are_none_are_told_together(tmp_path, capsys):
    make(tmp_path / "quick/sft", [step(1)])
    (tmp_path / "empty").mkdir()
    make(tmp_path / "torn", ["{"])
    arguments = ["report", *(str(tmp_path / name) for name in ("quick", "empty", "torn", "nowhere"))]
    assert cli.main(arguments) == 2
    first, second, third, fourth = capsys.readouterr().err.splitlines()
    assert f"quick: no metrics.jsonl in it; did you mean {tmp_path}/quick/sft?" in first
    assert "empty: no metrics.jsonl" in second and "torn/metrics.jsonl: no step in it but torn lines" in third
    assert "nowhere: no such directory" in fourth


def test_the_command_takes_runs_without_a_flag(tmp_path, capsys):
    run = make(tmp_path / "123", [step(1)])
    assert cli.main(["report", str(run), "--output", str(tmp_path / "out")]) == 0
    assert f"{tmp_path}/out/report.html" in capsys.readouterr().out
    assert cli.main(["report"]) == 2
    assert "runs: required" in capsys.readouterr().err
    assert cli.main(["report", "--help"]) == 0
    assert "tulu-mega report [RUNS ...]" in capsys.readouterr().out


def test_without_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setattr("tulu_mega.report.curves.importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="matplotlib is not installed"):
        made(make(tmp_path / "sft", [step(1)]))


def test_rollouts_of_the_newest_step_are_shown_with_what_they_earned(tmp_path):
    run = make(tmp_path / "grpo", [step(number, reward=0.5, solve_rate=0.25, seconds_generation=2.0) for number in (1, 2)])
    (run / "rollouts").mkdir()
    said = {"messages": [{"role": "user", "content": "2+2?"}], "ground_truth": "4", "place": 6, "finish_reason": "stop"}
    rows = [
        {**said, "sample": 0, "response": "It is 4.", "reward": 10.0, "advantage": 0.75, "trained": True, "detail": "right"},
        {**said, "sample": 1, "response": "<b>five</b>", "reward": None, "advantage": 0.0, "trained": False, "error": "it hung"},
        {**said, "sample": 2, "response": "Well", "reward": -10.0, "verdict_reward": 0.0, "advantage": -1.0, "trained": True},
    ]
    for number, content in ((1, "{}\n"), (2, "".join(json.dumps(row) + "\n" for row in rows) + "{torn"), (3, "{}\n")):
        (run / f"rollouts/step_{number:06}.jsonl").write_text(content)
    page = made(run, samples=3)
    assert page.shows("step 2, prompt 7, response 3: reward -10 in the place of 0, advantage -1.00")
    assert page.shows("step 2, prompt 7, response 1: reward 10, advantage +0.75")
    assert page.shows("step 2, prompt 7, response 2: not judged")
    assert "<b>five</b>" in page.text and "it hung" in "".join(page.text) and "b" not in page.tags
    given = {"tokens": 5, "finish_reason": "stop"}
    held = [{"scores": {"gsm8k": score}, "score": 2 * score, **given} for score in (1.0, 0.0, 0.5, 1.0)]
    held.append({"scores": {"gsm8k": 1.0}, "score": None, "error": "it hung", "tokens": 15, "finish_reason": "length"})
    (run / "rollouts/heldout_000000.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*held, {}]) + "{torn")
    assert read_runs([str(run)], 1)[0].column("heldout_solve_rate") == ([0], [0.5])  # before the first step
    figures = ("heldout_score", "heldout_length", "heldout_truncated")
    assert [read_runs([str(run)], 1)[0].column(name) for name in figures] == [([0], [value]) for value in (1.25, 7.0, 0.2)]
    assert {"reward", "solve_rate", "time"} <= {drawing.chart.name for drawing in draw(read_runs([str(run)], 1))}


def test_the_held_out_loss_is_drawn_where_it_was_evaluated(tmp_path):
    steps = [
        step(number, **({"heldout_loss": 4 / number, "seconds_evaluation": 1.0} if number % 2 == 0 else {}))
        for number in range(1, 5)
    ]
    page = made(make(tmp_path / "sft", steps))
    told = "Held-out loss (mean of the trained tokens, or pairs). sft: 2 at step 2, 1 at step 4, lowest 1, highest 2."
    assert told in [picture["alt"] for picture in page.pictures]
    assert page.shows("time", "6 s"), "evaluation too"
