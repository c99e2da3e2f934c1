"""Parsers of what runs wrote and read back: records that a crash, a full disk or somebody has changed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from tests.fuzz.model_files import TALK, after_writing
from tests.lib.fuzzing import Parser
from tulu_mega.config import SftSettings
from tulu_mega.data.store import VERSION, TokenStore
from tulu_mega.errors import UserError
from tulu_mega.evaluation.samples import SampleFile
from tulu_mega.inference.addresses import read_record as read_server
from tulu_mega.launch.reporting import read_record as read_error
from tulu_mega.pins.record import PINS, Pins
from tulu_mega.preflight.same_run import same_run
from tulu_mega.report.read import read_run
from tulu_mega.report.report import page
from tulu_mega.train import checkpoint
from tulu_mega.train.checkpoint_files import damaged
from tulu_mega.train.metrics import cut_after
from tulu_mega.train.save_figures import SaveFigures, tell

METRICS = [{"step": step, "loss": 1.5, "tokens": 90, "seconds_forward": 0.1, "lr": "NaN", "mfu": 0.4} for step in (1, 2, 3)]
ROLLOUT = {
    "messages": TALK[:1], "ground_truth": "3", "dataset": "gsm8k", "response": "3", "tokens": 2, "finish_reason": "stop",
    "place": 0, "sample": 1, "reward": 1.0, "verdict_reward": 0.5, "advantage": 0.3, "trained": True, "scores": {"gsm8k": 1.0},
    "score": 1.0, "version": 3, "error": None,
}  # fmt: skip
SAMPLE = {
    "key": "ab", "problem": 0, "messages": TALK[:1], "answer": "3",
    "responses": [{"response": "3", "scores": {"exact_match": 1.0}, "finish_reason": "stop", "detail": "got 3"}],
}  # fmt: skip
RESULTS = {
    "tasks": {"gsm8k": {"title": "GSM8K", "problems": 9, "cut_off": 0,
                        "metrics": {"exact_match": {"value": 0.5, "low": 0.4, "high": 0.6}}}},
}  # fmt: skip


def lines(*rows: Any) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def parsers(place: Path) -> dict[str, Parser]:
    return {**reports(place), **records(place), **checkpoints(place), **stores(place)}


def reports(place: Path) -> dict[str, Parser]:
    run = place / "report"
    for folder in ("rollouts", "eval/samples"):
        (run / folder).mkdir(parents=True)
    sound = {
        "metrics.jsonl": lines(*METRICS),
        "config.json": json.dumps({"policy": {"loss": "grpo"}, "train": {"reduction": "mean"}}).encode(),
        "rollouts/heldout_000000.jsonl": lines(ROLLOUT, ROLLOUT),
        "rollouts/step_000003.jsonl": lines(ROLLOUT, ROLLOUT),
        "eval/results.json": json.dumps(RESULTS).encode(),
        "eval/samples/gsm8k.jsonl": lines(SAMPLE),
    }

    def of(name: str) -> Parser:
        def read(data: bytes) -> object:
            for other, content in sound.items():
                (run / other).write_bytes(data if other == name else content)
            return page([read_run(run, "run", 3)], [], run)

        seeds = [sound[name], json.dumps(json.loads(sound[name].splitlines()[0])).encode()]
        return Parser(read, seeds, (UserError,))

    return {f"report: {Path(name).name}": of(name) for name in sound}


def records(place: Path) -> dict[str, Parser]:
    run = place / "run"
    run.mkdir()
    settings = SftSettings.model_validate({"model": {"path": "m"}, "data": {"train": "x.jsonl"}, "run_dir": str(run)})
    metrics, samples, error = run / "metrics.jsonl", run / "samples.jsonl", run / "error.json"
    part = {"shown": "x (9 rows)", "digest": "ab", "seen": [[1, 2, 3, 4]]}
    pins = {
        "version": 1,
        "pins": {"model.path": {"given": "m", "parts": {"a": part}, "directory": True, "revision": None}},
        "accepted": [{"setting": "model", "change": "ab", "when": "now", "by": "me", "what": ["x"]}],
    }

    def cut() -> None:
        cut_after(metrics, 2)
        tell(metrics, SaveFigures(2, 1.0, 0.5, 1 << 20))

    def pinned() -> None:
        if found := Pins.read(run):
            for pin in found.pins.values():
                for each in pin.parts.values():
                    each.saw([])
            found.write(run)

    def answered() -> None:
        found = SampleFile(samples)
        "ab" in found  # noqa: B015

    server = {"state": "ready", "url": "http://x:1", "pid": 3, "incarnation": 1, "why": ""}
    failed = {"message": {"message": "x", "extraInfo": {"timestamp": "1", "py_callstack": "x"}}, "time": 1.0, "callstack": "x"}
    return {
        "metrics.jsonl of a resumed run": Parser(after_writing(metrics, cut), [lines(*METRICS)], ()),
        "config.json of a run": Parser(
            after_writing(run / "config.json", lambda: same_run(settings)), [settings.model_dump_json().encode()], (UserError,)
        ),
        "pins.json": Parser(after_writing(run / PINS, pinned), [json.dumps(pins).encode()], (UserError,)),
        "samples of an evaluation": Parser(after_writing(samples, answered), [lines(SAMPLE, SAMPLE | {"key": "b"})], ()),
        "server_N.json": Parser(
            after_writing(run / "server_0.json", lambda: read_server(run, 0)), [json.dumps(server).encode()], (UserError,)
        ),
        "a rank's error file": Parser(after_writing(error, lambda: read_error(error)), [json.dumps(failed).encode()], ()),
    }


TRAINING = {
    "step": 3, "state": {"streak": 0, "seen": 9}, "finite": True, "random": "every rank's", "format": "reshardable",
    "model": {"hidden_size": 64}, "layout": {"tensor": 1}, "cut": {}, "files": {"x.distcp": 4}, "digests": {"x.distcp": "ab"},
    "engines": {"value": {"model": {}, "layout": {}, "cut": {}}},
}  # fmt: skip


def checkpoints(place: Path) -> dict[str, Parser]:
    step = place / "checkpoints" / "step_3"
    step.mkdir(parents=True)
    (step / "x.distcp").write_bytes(b"1234")

    def found() -> None:
        for each in checkpoint.find(step.parent):
            _ = each.healthy, each.step + 1

    def bytes_of() -> None:
        damaged(step.parent)

    seeds = [json.dumps(TRAINING).encode()]
    return {
        "training.json": Parser(after_writing(step / checkpoint.MANIFEST, found), seeds, ()),
        "training.json: digests": Parser(after_writing(step / checkpoint.MANIFEST, bytes_of), seeds, ()),
    }


def stores(place: Path) -> dict[str, Parser]:
    data = place / "data"
    data.mkdir()
    meta = {
        "version": VERSION, "key": "k", "width": 1, "rejected": {"malformed": 1}, "template": "tulu", "told": ["x"], "ends": [0],
        "max_token": 9, "tokens": 3, "sources": [{"source": "x", "unit": "line", "fingerprint": "f", "rows": 3, "amount": None,
                                                  "drawn": 3}],
    }  # fmt: skip
    arrays = {
        "tokens": np.arange(3, dtype=np.int32), "labels": np.arange(3, dtype=np.int32), "offsets": np.array([0, 3]),
        "supervised": np.array([2], np.int32), "cuts": np.array([0], np.int32), "origins": np.array([[0, 1]]),
        "margins": np.zeros(1),
    }  # fmt: skip
    sound = {"meta.json": json.dumps(meta).encode()}
    for name, array in arrays.items():
        np.save(data / f"{name}.npy", array)
        sound[f"{name}.npy"] = (data / f"{name}.npy").read_bytes()

    def of(name: str) -> Parser:
        def read(content: bytes) -> object:
            for other, held in sound.items():
                (data / other).write_bytes(content if other == name else held)
            store = TokenStore.open(data)
            return [store[row] for row in range(min(len(store), 3))], store.dropped, [store.where(0)] if len(store) else []

        return Parser(read, [sound[name]], (UserError,))

    return {f"tokenised rows: {name}": of(name) for name in ("meta.json", "tokens.npy", "offsets.npy", "origins.npy")}
