"""Generation by a real vLLM on a tiny model, against transformers, and what is refused before vLLM starts."""

import json
import os
from pathlib import Path

import pytest

from tulu_mega.config import GenerateSettings, ModelSettings
from tulu_mega.errors import UserError
from tulu_mega.inference import offline as door
from tulu_mega.inference.generate import generate
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


def test_a_conversation_is_kept_until_reset(model, monkeypatch, capsys):
    asked = []

    class Parrot:
        def __init__(self, *arguments, **options):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def __call__(self, prompts, sampling):
            text = tokenizer.decode(prompts[0])
            asked.append(text)
            return [[Completion([*tokenizer.encode(f"turn {len(asked)}"), tokenizer.eos_token_id], "stop")]]

    tokenizer = tiny_model.make_tokenizer()
    lines = iter(["one", "", "two", "x" * 600, "/reset", "three"])

    def typed(prompt):
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr(door, "Generator", Parrot)
    monkeypatch.setattr("builtins.input", typed)
    generate(settings(model, system="S"))
    start = "<|system|>\nS\n<|user|>\n"
    assert asked == [
        f"{start}one\n<|assistant|>\n",
        f"{start}one\n<|assistant|>\nturn 1<|end_of_text|>\n<|user|>\ntwo\n<|assistant|>\n",
        f"{start}three\n<|assistant|>\n",
    ]
    told = capsys.readouterr()
    assert told.out.splitlines() == ["turn 1", "turn 2", "turn 3"]
    assert "may have 512" in told.err


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
    monkeypatch.setattr(door.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"vLLM is not installed.*tulu_mega\[cpu\]"):
        generate(settings(model))


def test_a_vllm_that_fails_says_why_and_where(model, tmp_path):
    pytest.importorskip("vllm")
    log = tmp_path / "vllm.log"
    with pytest.raises(UserError, match=rf"vLLM could not start: .*{log}"), Generator(str(model), dtype="nonsense", log=log):
        pass
    assert "nonsense" in log.read_text()
