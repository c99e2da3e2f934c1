"""metrics.jsonl, the console, wandb and the peaks."""

from __future__ import annotations

import io
import json
import math
import sys
import types

import pytest
import torch

from tulu_mega.config import SftSettings
from tulu_mega.layout.hardware import named_peak
from tulu_mega.train import metrics
from tulu_mega.train.metrics import MetricsLog, StepRecord, StepSeconds


def settings(run_dir, **more):
    return SftSettings.model_validate({"model": "m", "run_dir": str(run_dir), "data": {"train": "d"}, **more})


def record(step, **changes):
    values = {
        "loss": 1.5,
        "grad_norm": 0.25,
        "lr": 1e-5,
        "tokens": 800,
        "supervised_tokens": 200,
        "padding": 0.1,
        "flops": 4e12,
        "seconds": StepSeconds(data=0.5, forward_backward=3.0, optimizer=0.5, checkpoint=10.0),
    }
    return StepRecord(step=step, **(values | changes))


def lines(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_a_step_in_full(tmp_path):
    console = io.StringIO()
    with MetricsLog(tmp_path, settings(tmp_path), 20, world_size=2, peak=1e12, console=console) as log:
        log.step(record(1, extra={"nll": 0.7}))
    (line,) = lines(tmp_path)
    assert line.pop("memory_gib") > 0.01
    assert line == {
        "step": 1,
        "loss": 1.5,
        "grad_norm": 0.25,
        "lr": 1e-5,
        "tokens": 800,
        "supervised_tokens": 200,
        "tokens_per_second": 200.0,  # over 4 s: the checkpoint's 10 s are no work
        "supervised_tokens_per_second": 50.0,
        "padding": 0.1,
        "tflops": 0.5,
        "mfu": 0.5,
        "mfu_peak": "bf16",
        "memory_reserved_gib": None,
        "seconds_data": 0.5,
        "seconds_forward_backward": 3.0,
        "seconds_optimizer": 0.5,
        "seconds_checkpoint": 10.0,
        "nll": 0.7,
    }
    text = console.getvalue()
    assert text.startswith("step  1/20  loss 1.5000  grad 0.250  lr 1.00e-05  200 tokens/s  mfu 50.0%  ")
    assert text.endswith(" left\n")


def test_lines_are_on_disk_at_once_and_any_json_parser_reads_them(tmp_path):
    log = MetricsLog(tmp_path, settings(tmp_path), 2, console=io.StringIO())
    log.step(record(1, loss=math.nan, grad_norm=-math.inf))

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    line = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert line["loss"] == "NaN" and line["grad_norm"] == "-Infinity" and line["mfu"] is None
    assert math.isnan(float(line["loss"]))
    log.close()


@pytest.mark.parametrize("torn", ["", '{"step": 6, "lo', '{"step": 6}'])
def test_a_resumed_file_reads_as_one_run(tmp_path, torn):
    with MetricsLog(tmp_path, settings(tmp_path), 6, console=io.StringIO()) as log:
        for step in range(1, 6):
            log.step(record(step, loss=float(step)))
    before = (tmp_path / "metrics.jsonl").read_text().splitlines()[:3]
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write(torn)
    with MetricsLog(tmp_path, settings(tmp_path), 6, resumed_step=3, console=io.StringIO()) as log:
        for step in range(4, 7):
            log.step(record(step, loss=float(step)))
    assert [line["loss"] for line in lines(tmp_path)] == [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    assert (tmp_path / "metrics.jsonl").read_text().splitlines()[:3] == before


def test_a_new_run_in_an_old_directory_starts_the_file_anew(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    MetricsLog(tmp_path, settings(tmp_path), 6, console=io.StringIO()).close()
    assert lines(tmp_path) == []


def test_log_every_thins_the_console_not_the_file(tmp_path):
    console = io.StringIO()
    with MetricsLog(tmp_path, settings(tmp_path, train={"log_every": 3}), 7, console=console) as log:
        for step in range(1, 8):
            log.step(record(step))
    assert [line.split()[1] for line in console.getvalue().splitlines()] == ["3/7", "6/7", "7/7"]
    assert len(lines(tmp_path)) == 7


def test_on_a_terminal_lines_stay_readable(tmp_path):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    console = Terminal()
    with MetricsLog(tmp_path, settings(tmp_path), 2, console=console) as log:
        log.step(record(1))
        log.step(record(2))
    assert "step 1/2  loss 1.5000" in console.getvalue() and "step 2/2" in console.getvalue()


class FakeWandb(types.ModuleType):
    """Stands in for wandb's module: what it is asked, and failures on demand."""

    def __init__(self, fail=()):
        super().__init__("wandb")
        self.fail, self.calls = set(fail), []

    def Settings(self, **_):
        return None

    def init(self, **arguments):
        self._call("init", arguments)
        return types.SimpleNamespace(
            log=lambda values, step: self._call("log", {"values": values, "step": step}),
            finish=lambda exit_code: self._call("finish", {"exit_code": exit_code}),
        )

    def _call(self, name, arguments):
        self.calls.append((name, arguments))
        if name in self.fail:
            raise ConnectionError("no route\nto host")


def test_wandb_resumes_under_the_same_id(tmp_path, monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    configured = settings(tmp_path, wandb={"mode": "offline", "name": "n"})
    for _ in range(2):
        with MetricsLog(tmp_path, configured, 2, console=io.StringIO()) as log:
            log.step(record(1))
    (_, first), (_, logged), (_, finished), (_, second), *_ = fake.calls
    assert first["id"] == second["id"] == (tmp_path / "wandb_id").read_text()
    assert first["resume"] == "allow" and first["mode"] == "offline" and first["config"]["seed"] == 123
    assert logged["step"] == 1 and logged["values"]["loss"] == 1.5 and "mfu" not in logged["values"]
    assert finished == {"exit_code": 0}


@pytest.mark.parametrize("where", ["init", "log", "finish"])
def test_a_failing_wandb_is_told_once_and_stops_nothing(tmp_path, monkeypatch, capsys, where):
    monkeypatch.setitem(sys.modules, "wandb", FakeWandb(fail=[where]))
    with MetricsLog(tmp_path, settings(tmp_path, wandb={"mode": "online"}), 2, console=io.StringIO()) as log:
        log.step(record(1))
        log.step(record(2))
    assert len(lines(tmp_path)) == 2
    assert capsys.readouterr().err.count("warning: wandb") == 1


@pytest.mark.slow
def test_real_wandb_offline(tmp_path, monkeypatch, capsys):
    pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    with MetricsLog(tmp_path, settings(tmp_path, wandb={"mode": "offline"}), 1, console=io.StringIO()) as log:
        log.step(record(1, loss=math.nan))
    assert list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
    assert "warning: wandb" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "bf16"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA GeForce RTX 3090", None),
    ],
)
def test_peaks_by_name(name, bf16):
    assert named_peak(name, fp32=False) == bf16


def test_a_cpu_has_no_peak():
    """Measured beside something else that ran, it made the share of it more than 100%."""
    assert metrics.peak_flops(torch.device("cpu"), torch.float32) is None


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (61, "1:01"), (3661, "1:01:01"), (360000, "100:00:00")]
)
def test_clock(seconds, text):
    assert metrics.clock(seconds) == text
