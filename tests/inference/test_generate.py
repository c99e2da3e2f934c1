"""Generation by a real vLLM on a tiny model, against transformers, and what is refused before vLLM starts."""

import json
import os
import signal
from pathlib import Path

import psutil
import pytest

from tests.lib.other_python import other_python
from tulu_mega.config import GenerateSettings, ModelSettings
from tulu_mega.errors import UserError
from tulu_mega.inference import interpreter
from tulu_mega.inference import offline as door
from tulu_mega.inference.generate import generate, how_taken, prepared
from tulu_mega.inference.offline import Completion, Generator, Sampling
from tulu_mega.quickstart import tiny_model

pytestmark = pytest.mark.servers

PROMPTS = [[5, 6, 7], [40, 41, 42, 43, 44, 45], [300]]


@pytest.fixture
def shared_server(vllm, monkeypatch):
    """`generate` with this file's one vLLM in place of a new one."""

    class Shared:
        def __init__(self, *arguments, **options):
            pass

        def __enter__(self):
            return vllm

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(door, "Generator", Shared)


def settings(model: Path, **values) -> GenerateSettings:
    values = {"max_tokens": 6, **{name: str(value) if isinstance(value, Path) else value for name, value in values.items()}}
    return GenerateSettings(model=ModelSettings(path=str(model), dtype="fp32"), **values)


def rows_file(path: Path, rows: list) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8")
    return path


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def greedy(model: Path, prompt: list[int], tokens: int) -> list[int]:
    import torch
    from transformers import LlamaForCausalLM

    llama = LlamaForCausalLM.from_pretrained(model)
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(tokens):
            ids.append(int(llama(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def test_greedy_tokens_are_those_of_transformers(vllm, model):
    answers = vllm(PROMPTS, Sampling(max_tokens=12))
    assert [completion.token_ids for (completion,) in answers] == [greedy(model, prompt, 12) for prompt in PROMPTS]
    assert {completion.finish_reason for (completion,) in answers} == {"length"}


def test_a_stop_token_ends_the_response_and_belongs_to_it(vllm):
    ((free,),) = vllm(PROMPTS[:1], Sampling(max_tokens=12))
    stop = free.token_ids[3]
    first = free.token_ids.index(stop)
    assert vllm(PROMPTS[:1], Sampling(max_tokens=12, stop_ids=(stop,))) == [[Completion(free.token_ids[: first + 1], "stop")]]


def test_a_response_is_given_as_it_comes_and_may_be_stopped(vllm):
    sampling = Sampling(max_tokens=12)
    ((whole,),) = vllm(PROMPTS[:1], sampling)
    pieces = list(vllm.stream(PROMPTS[0], sampling))
    assert [token for piece in pieces for token in piece.token_ids] == whole.token_ids
    assert [piece.finish_reason for piece in pieces] == [None] * 11 + ["length"]
    long, seen = Sampling(max_tokens=400), 0
    for _ in vllm.stream(PROMPTS[0], long):
        seen += 1
        if seen == 1:
            vllm.stop()
    assert seen < 400
    vllm.stop()  # of nothing
    assert vllm(PROMPTS[:1], sampling) == [[whole]], "what was stopped leaves nothing behind"


def test_answers_come_as_they_are_done(vllm):
    assert sorted(place for place, _ in vllm.each(PROMPTS, Sampling(max_tokens=3))) == [0, 1, 2]


def test_samples_differ_and_their_seed_repeats_them_in_any_batch(vllm):
    sampling = Sampling(max_tokens=8, temperature=1.0, samples=3, seed=4)
    first = vllm(PROMPTS, sampling)
    assert len({tuple(completion.token_ids) for completion in first[0]}) == 3
    assert vllm(PROMPTS, sampling) == first
    assert vllm(PROMPTS[:1], sampling) == first[:1]
    assert vllm(PROMPTS[:1], Sampling(max_tokens=8, temperature=1.0, samples=3, seed=99)) != first[:1]


def test_many_seeded_samples_of_long_prompts(vllm):
    """More prompt tokens than a forward pass takes: computed in parts, seeded requests end vLLM on a CPU."""
    prompts = [[3 + (number * token) % 400 for token in range(1, 301)] for number in range(1, 11)]
    answers = vllm(prompts, Sampling(max_tokens=2, temperature=1.0, samples=8))
    assert [len(completions) for completions in answers] == [8] * 10


def test_jsonl_in_and_out(shared_server, model, tmp_path):
    rows = [
        {"id": 1, "messages": [{"role": "user", "content": "Ada has 3 pens."}]},
        {"id": 2, "prompt": "<|user|>\nAda has 3 pens.\n<|assistant|>\n"},
        {"id": "three", "input_ids": [5, 6, 7], "note": "é"},
    ]
    output = tmp_path / "new/answers.jsonl"
    generate(settings(model, input=rows_file(tmp_path / "in.jsonl", [rows[0], "", *rows[1:]]), output=output))
    answers = read(output)
    assert [{name: answer[name] for name in row} for row, answer in zip(rows, answers, strict=True)] == rows
    assert answers[0]["output_ids"] == answers[1]["output_ids"], "the same text by the template and written out"
    assert answers[2]["output_ids"] == greedy(model, [5, 6, 7], 6)
    for row, answer in zip(rows, answers, strict=True):
        assert set(answer) - set(row) == {"response", "output_ids", "finish_reason"}
    assert os.listdir(output.parent) == ["answers.jsonl"]


def test_several_samples_are_numbered_lines(shared_server, model, tmp_path, capsys):
    file = rows_file(tmp_path / "in.jsonl", [{"input_ids": prompt} for prompt in PROMPTS])
    generate(settings(model, input=file, samples=2, temperature=1.0))
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    numbered = [(line["input_ids"], line["sample"]) for line in lines]
    assert numbered == [(prompt, sample) for prompt in PROMPTS for sample in (0, 1)]


def test_a_system_message_is_put_before_a_conversation_without_one(shared_server, model, tmp_path):
    user, system = {"role": "user", "content": "Hi"}, {"role": "system", "content": "Be brief."}
    plain = rows_file(tmp_path / "plain.jsonl", [{"messages": [user]}])
    whole = rows_file(tmp_path / "whole.jsonl", [{"messages": [system, user]}])
    generate(settings(model, input=plain, output=tmp_path / "a", system="Be brief."))
    generate(settings(model, input=whole, output=tmp_path / "b", system="Ignored"))
    generate(settings(model, input=plain, output=tmp_path / "c"))
    with_system, its_own, without = (read(tmp_path / name)[0]["output_ids"] for name in "abc")
    assert with_system == its_own != without


class Parrot:
    """In place of vLLM: says what number the turn has, a token at a time, until it is stopped."""

    def __init__(self, *arguments, **options):
        self.asked, self.stopped, self.tokenizer = [], False, tiny_model.make_tokenizer()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def __call__(self, prompts, sampling):
        return [[Completion([*self.tokenizer.encode(f"sample {n}"), 0], "stop") for n in range(sampling.samples)]]

    def stream(self, prompt, sampling):
        self.asked.append(self.tokenizer.decode(prompt))
        for token in self.tokenizer.encode(f"turn {len(self.asked)}é"):
            yield Completion([token], None)
            if self.stopped:
                return
        yield Completion([self.tokenizer.eos_token_id], "stop")

    def stop(self):
        self.stopped = True


@pytest.fixture
def typing(monkeypatch):
    """`typing(lines)` makes the next conversation's lines."""

    def use(*lines):
        rest = iter(lines)

        def typed(prompt=""):
            try:
                return next(rest)
            except StopIteration:
                raise EOFError from None

        monkeypatch.setattr("builtins.input", typed)

    return use


def test_a_conversation_is_kept_until_reset(model, monkeypatch, typing, capsys):
    parrot = Parrot()
    monkeypatch.setattr(door, "Generator", lambda *_, **__: parrot)
    typing("one", "", "two", "x" * 600, "/reset", "three", "/system T", "four", "/system", "five", "/exit", "six")
    generate(settings(model, system="S"))
    start = "<|system|>\nS\n<|user|>\n"
    assert parrot.asked == [
        f"{start}one\n<|assistant|>\n",
        f"{start}one\n<|assistant|>\nturn 1é<|end_of_text|>\n<|user|>\ntwo\n<|assistant|>\n",
        f"{start}three\n<|assistant|>\n",
        "<|system|>\nT\n<|user|>\nfour\n<|assistant|>\n",
        "<|user|>\nfive\n<|assistant|>\n",
    ]
    told = capsys.readouterr()
    assert told.out.splitlines() == [f"turn {number}é" for number in range(1, 6)]
    assert "may have 512" in told.err


def test_commands_are_not_sent_to_the_model(model, monkeypatch, typing, capsys):
    parrot = Parrot()
    monkeypatch.setattr(door, "Generator", lambda *_, **__: parrot)
    typing("/help", "/?", "/rest", "/HELP me", "/etc/hosts is what?", "/bye", "never")
    generate(settings(model))
    assert parrot.asked == ["<|user|>\n/etc/hosts is what?\n<|assistant|>\n"]
    told = capsys.readouterr()
    assert told.err.count("begins a new conversation") == 4 * 2
    assert "/rest is no command; did you mean '/reset'?; nothing was sent to the model" in told.err


def test_words_are_shown_as_they_come_and_ctrl_c_ends_an_answer(model, monkeypatch, typing, capsys):
    parrot = Parrot()
    shown = []
    before = signal.getsignal(signal.SIGINT)

    def stream(prompt, sampling):
        for piece in Parrot.stream(parrot, prompt, sampling):
            shown.append(capsys.readouterr().out)
            if len(shown) == 3:
                signal.raise_signal(signal.SIGINT)
            yield piece

    parrot.stream = stream
    monkeypatch.setattr(door, "Generator", lambda *_, **__: parrot)
    typing("one")
    generate(settings(model))
    assert "".join(shown) and parrot.stopped and capsys.readouterr().out.endswith(" [stopped]\n")
    assert signal.getsignal(signal.SIGINT) is before


def test_several_samples_of_a_turn_are_all_shown(model, monkeypatch, typing, capsys):
    monkeypatch.setattr(door, "Generator", Parrot)
    typing("one")
    generate(settings(model, samples=2, temperature=1.0))
    assert "[1] sample 0" in (out := capsys.readouterr().out) and "[2] sample 1" in out


def test_how_rows_are_asked_is_said_and_chosen(model, tmp_path):
    messages = [{"role": "user", "content": "Hi"}]
    rows = [{"messages": messages}, {"prompt": messages}, {"prompt": "Hi"}, {"input_ids": [5]}]
    file = rows_file(tmp_path / "in.jsonl", rows)
    raw, chat = (prepared(settings(model, input=file, prompts=how)) for how in ("raw", "chat"))
    assert raw.prompts[0] == raw.prompts[1] != raw.prompts[2] and chat.prompts[2] == raw.prompts[0]
    assert how_taken(raw.rows, raw.settings) == (
        "2 rows as conversations under the model's own template; 1 rows of prompt as they are, without a template "
        "(--prompts chat asks them as conversations); 1 rows of input_ids as they are"
    )
    assert how_taken(chat.rows, chat.settings).startswith("3 rows as conversations under the model's own template; 1")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{oops", "not valid JSON"),
        ("[1]", "expected a JSON object"),
        ({}, "no messages, prompt or input_ids"),
        ({"prompt": "a", "input_ids": [1]}, "has prompt and input_ids"),
        ({"prompt": 3}, "expected text"),
        ({"prompt": ""}, "no tokens"),
        ({"messages": [{"role": "robot", "content": "a"}]}, "robot"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "nothing to answer"),
        ({"input_ids": [1, "2"]}, "whole numbers"),
        ({"input_ids": [True]}, "whole numbers"),
        ({"input_ids": [512]}, "outside the vocabulary of 424"),
        ({"prompt": "a", "note": "\ud800"}, "lone surrogate"),
        ({"input_ids": [1] * 512}, "has 512 tokens"),
    ],
)
def test_bad_rows_are_named_before_vllm_starts(model, tmp_path, row, message):
    file = rows_file(tmp_path / "in.jsonl", [{"prompt": "fine"}, "", row, row])
    with pytest.raises(UserError) as caught:
        generate(settings(model, input=file, output=tmp_path / "out.jsonl"))
    assert [problem.split(":")[0] for problem in caught.value.problems] == [f"{file} line 3", f"{file} line 4"]
    assert all(message in problem for problem in caught.value.problems)
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"input": "absent.jsonl"}, "no such file"),
        ({"output": "out.jsonl"}, "without an input"),
        ({"max_model_len": 4096}, "made for 512"),
    ],
)
def test_bad_settings(model, values, message):
    with pytest.raises(UserError, match=message):
        generate(settings(model, **values))


def test_an_empty_file_and_an_output_that_is_a_directory(model, tmp_path):
    with pytest.raises(UserError, match="no rows"):
        generate(settings(model, input=rows_file(tmp_path / "empty.jsonl", [""])))
    with pytest.raises(UserError, match="is a directory"):
        generate(settings(model, input=rows_file(tmp_path / "in.jsonl", [{"prompt": "a"}]), output=tmp_path))


def test_not_a_model_directory(model, tmp_path):
    with pytest.raises(UserError, match=r"no config\.json"):
        generate(settings(tmp_path))
    (tmp_path / "config.json").write_text((model / "config.json").read_text())
    with pytest.raises(UserError, match=r"no \*\.safetensors"):
        generate(settings(tmp_path))
    with pytest.raises(UserError, match="neither a model directory nor a hub name"):
        generate(settings(tmp_path / "absent"))


def test_vllm_missing(model, monkeypatch):
    monkeypatch.setattr(interpreter.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"vLLM is not installed.*tulu_mega\[cpu\]"):
        generate(settings(model))


def test_a_vllm_that_fails_says_why_and_where(model, tmp_path):
    pytest.importorskip("vllm")
    log = tmp_path / "vllm.log"
    with pytest.raises(UserError, match=rf"vLLM could not start: .*{log}"), Generator(str(model), dtype="nonsense", log=log):
        pass
    assert "nonsense" in log.read_text()


@pytest.mark.acceptance
def test_vllm_of_another_environment_answers_the_same(vllm, model, tmp_path):
    python = other_python(tmp_path / "other")
    out = {}
    for name, given in (("ours", None), ("theirs", str(python))):
        rows = rows_file(tmp_path / "in.jsonl", [{"input_ids": prompt} for prompt in PROMPTS])
        generate(settings(model, input=rows, output=tmp_path / f"{name}.jsonl", python=given))
        out[name] = read(tmp_path / f"{name}.jsonl")
    assert out["ours"] == out["theirs"] and [row["output_ids"] for row in out["ours"]] == [
        completion.token_ids for (completion,) in vllm(PROMPTS, Sampling(max_tokens=6))
    ]
    with Generator(str(model), python=str(python), log=tmp_path / "vllm.log") as started:
        assert psutil.Process(started._process.pid).cmdline()[0] == str(python)
