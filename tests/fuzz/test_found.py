"""What random inputs found, made small: each ended a parser by an exception that nobody expects, or kept it for minutes."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path

import numpy as np
import pytest

from tests.fuzz import answers, messages, model_files, rows, run_files
from tests.fuzz.model_files import LLAMA, OLMO, QWEN
from tests.fuzz.run_files import METRICS, RESULTS, ROLLOUT, SAMPLE, TRAINING
from tulu_mega.data.store import VERSION

DEEP = b"[" * 5000
DIGITS = b"9" * 5000


def told(content: object, **changes: object) -> bytes:
    return json.dumps({**content, **changes} if isinstance(content, dict) else content).encode()


def array(rows: list[list[int]]) -> bytes:
    written = io.BytesIO()
    np.save(written, np.array(rows))
    return written.getvalue()


FOUND = {
    "origins: a source that is none": (run_files, "tokenised rows: origins.npy", array([[130, 1]])),
    "metrics: a number beyond JSON's": (run_files, "metrics.jsonl of a resumed run", b'{"step": 2, "loss": 1e999}\n'),
    "results.json: a task of a long name": (
        run_files, "report: results.json", told({"tasks": {"9" * 300: next(iter(RESULTS["tasks"].values()))}})
    ),
    "ifeval's function is a list": (answers, "verifier ifeval", told({"dataset": "ifeval", "response": "x",
                                                                     "ground_truth": {"func_name": [], "N": 3}})),
    "config: architectures a number": (model_files, "config.json", told(LLAMA, architectures=5)),
    "config: architectures in lists": (model_files, "config.json", told(LLAMA, architectures=[["LlamaForCausalLM"]])),
    "config: layers without end": (model_files, "config.json", told(QWEN, num_hidden_layers=10**30)),
    "config: layer types a number": (model_files, "config.json", told(OLMO, layer_types=5)),
    "config: first window of text": (model_files, "config.json", told(QWEN, max_window_layers="x")),
    "config: labels a number": (
        model_files, "config.json", told(LLAMA, architectures=["LlamaForSequenceClassification"], id2label=3)
    ),
    "config: a size that transformers refuses": (model_files, "config.json by transformers", told(LLAMA, hidden_size="x")),
    "config: layers that transformers would list": (
        model_files, "config.json by transformers", told(QWEN, num_hidden_layers=1 << 63)
    ),
    "config: labels that transformers would list": (model_files, "config.json by transformers", told(LLAMA, num_labels=10**9)),
    "config: layers within": (
        model_files, "config.json by transformers", told(QWEN, text_config={"num_hidden_layers": 1 << 62}, model_type="gemma3")
    ),
    "math: a number beyond floats": (answers, "verifier math", told({"dataset": "math", "response": "x",
                                                                    "ground_truth": 10**400})),
    "ifeval: a count beyond floats": (answers, "verifier ifeval", told({"dataset": "ifeval", "response": "x", "ground_truth": {
        "func_name": "validate_word_constraint", "N": 10**400, "quantifier": "around"}})),
    "rlvr: a verifier that is no name": (
        rows, "rows of rlvr", told({"messages": [{"role": "user", "content": "x"}], "ground_truth": {}, "dataset": [None]})
    ),
    "checkpoint: a state that is none": (run_files, "training.json", told(TRAINING, state=False)),
    "checkpoint: a step of text": (run_files, "training.json", told(TRAINING, step="")),
    "generation: a list": (model_files, "generation_config.json", b"[1]"),
    "generation: deep": (model_files, "generation_config.json", DEEP),
    "index: a name too long": (model_files, "safetensors: index", told({"weight_map": {"a": "x" * 300}})),
    "index: a name with a zero": (model_files, "safetensors: index", told({"weight_map": {"a": "\0"}})),
    "tokenizer: a length of text": (
        model_files, "tokenizer_config.json", told({"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": "x",
                                                    "eos_token": "<|end_of_text|>"})
    ),
    "manifest: no tensors": (model_files, "convert: manifest.json", told({"plan": {}, "files": [{"file": "x", "size": 4,
                                                                                                 "tensors": None}]})),
    "record: a hash that is a number": (model_files, "convert: record of a file", told(
        {"file": "x", "size": 4, "tensors": {"a": {"hash": 3, "dtype": "x", "shape": [], "place": None}}})),
    "responses: no version": (messages, "a server's line of responses", told({"choices": [
        {**choice, "weight_versions": [{"start": 0, "end": 2}]} for choice in messages.ANSWER["choices"]]})),
    "responses: a log-probability too large": (messages, "a server's line of responses", told({"choices": [
        {**choice, "logprobs": [-(10**400), -1]} for choice in messages.ANSWER["choices"]]})),
    "responses: deep": (messages, "a server's line of responses", DEEP),
    "control: deep": (messages, "a server's answers to its control", b"\0" + DEEP),
    "control: no results": (messages, "a server's answers to its control", b'\0{"results": null, "world_size": "x"}'),
    "control: a worker that says nothing": (messages, "a server's answers to its control", b'\0{"results": [{}, 3]}'),
    "weights: no manifest": (messages, "messages about weights", b'{"begin": {"version": 3, "load": true}}'),
    "weights: a shape of text": (messages, "messages about weights", told({"begin": {
        "version": 3, "load": True, "manifest": {"a": {"shape": "23", "dtype": "float32", "sender": 0}}}})),
    "weights: places of floats": (messages, "messages about weights", told({"bucket": {
        "version": 3, "sender": 0, "slot": 0, "places": [["a", 0.5, 24]]}})),
    "weights: a commit of a list": (messages, "messages about weights", b'{"commit": {"version": 3, "checksums": []}}'),
    "settings: deep": (rows, "settings of sft", b"x = " + DEEP),
    "settings: thousands of digits": (rows, "settings of grpo", b"[optim]\nlr = " + DIGITS),
    "settings: thousands of digits in base 16": (rows, "settings of sft", b"[train]\nsteps = 0x" + b"f" * 5000),
    "flags: deep": (rows, "flags", b"--data.train " + DEEP),
    "command: deep": (rows, "settings of which command", b"x = " + DEEP),
    "rows: deep, and not a number": (rows, "rows of pairs", b"[NaN," * 2000),
    "a list of rows: deep": (rows, "rows of a JSON list", DEEP),
    "a list of rows: digits": (rows, "rows of a JSON list", b"[" + DIGITS + b"]"),
    "BIG-Bench: deep": (rows, "BIG-Bench's files", DEEP),
    "worked examples: no text": (rows, "BIG-Bench's worked examples", b"\x80"),
    "report: a figure too large": (run_files, "report: metrics.jsonl", told(METRICS[0], loss=10**400)),
    "report: a step too large": (run_files, "report: metrics.jsonl", told(METRICS[0], step=10**400)),
    "report: two thousand million steps": (run_files, "report: metrics.jsonl", told(METRICS[0], step=1 << 31)),
    "report: deep metrics": (run_files, "report: metrics.jsonl", told(METRICS[0]) + b"\n" + DEEP),
    "report: sections that are none": (run_files, "report: config.json", b'{"policy": [1], "train": 3}'),
    "report: a response without a prompt": (run_files, "report: step_000003.jsonl", told(ROLLOUT, messages=[])),
    "report: a reward of text": (run_files, "report: step_000003.jsonl", told(ROLLOUT, reward="x")),
    "report: figures of text": (run_files, "report: heldout_000000.jsonl", told(ROLLOUT, tokens="x", score=[])),
    "report: results without figures": (run_files, "report: results.json", told({"tasks": {"gsm8k": {"metrics": {"x": 3}},
                                                                                           "math": None}})),
    "report: a task's title": (run_files, "report: results.json", told({"tasks": {"gsm8k": {**RESULTS["tasks"]["gsm8k"],
                                                                                           "title": []}}})),
    "report: a sample without a response": (run_files, "report: gsm8k.jsonl", told(SAMPLE, responses=[3])),
    "metrics: deep": (run_files, "metrics.jsonl of a resumed run", DEEP),
    "a run's settings: a list": (run_files, "config.json of a run", b"[1]"),
    "a run's settings: deep": (run_files, "config.json of a run", DEEP),
    "pins: deep": (run_files, "pins.json", DEEP),
    "samples: deep": (run_files, "samples of an evaluation", DEEP),
    "a server's record: a list": (run_files, "server_N.json", b"[1]"),
    "a rank's error: deep": (run_files, "a rank's error file", DEEP),
    "a checkpoint's digests: a list": (run_files, "training.json: digests", b'{"digests": [1]}'),
    "a store's sources: no unit": (run_files, "tokenised rows: meta.json", told({
        "version": VERSION, "key": "k", "width": 1, "rejected": {}, "template": "tulu", "told": [], "ends": [], "max_token": 9,
        "tokens": 3, "sources": [{"source": "x"}]})),
    "a store's array: half a header": (run_files, "tokenised rows: tokens.npy", b"\x93NUMPY\x01\x00v\x00{'descr': '<i4', ("),
    "a store's rows: a list": (run_files, "tokenised rows: meta.json", b"[1]"),
}  # fmt: skip


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> dict:
    """The parsers of each group, made once."""
    return {}


@pytest.mark.parametrize(("group", "name", "data"), FOUND.values(), ids=FOUND)
def test_it_is_refused_in_the_parsers_own_words(places, tmp_path_factory, group, name, data):
    if group not in places:
        places[group] = group.parsers(Path(tmp_path_factory.mktemp("found")))
    parser = places[group][name]
    with contextlib.suppress(*parser.refuses):
        parser.parse(data)
