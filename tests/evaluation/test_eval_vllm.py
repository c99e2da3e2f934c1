"""Evaluation through a real vLLM: the quickstart's tiny model on the quickstart's task, and a choice of letters."""

import json
from itertools import islice
from pathlib import Path

import pytest

from tulu_mega.evaluation.run import evaluate
from tulu_mega.evaluation.settings import EvalSettings
from tulu_mega.inference import offline as door
from tulu_mega.inference.offline import Sampling
from tulu_mega.quickstart import task, tiny_model

pytestmark = pytest.mark.servers

pytest.importorskip("vllm")

PROBLEMS = 12
CHOICES = ["tin", "pen", "egg", "jar"]


@pytest.fixture
def model(tiny) -> Path:
    return tiny


@pytest.fixture
def starts(vllm, monkeypatch) -> list:
    """This file's one vLLM in place of new ones; how often one was asked for."""
    seen = []

    class Shared:
        def __init__(self, *arguments, **options):
            seen.append(arguments)

        def __enter__(self):
            return vllm

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(door, "Generator", Shared)
    return seen


def letters(model: Path, prompt: str) -> list[float]:
    """Log-probabilities of A to D behind a prompt, by transformers."""
    import torch
    from transformers import LlamaForCausalLM

    tokenizer = tiny_model.make_tokenizer()
    ids = [tokenizer.encode(letter)[0] for letter in "ABCD"]
    with torch.no_grad():
        logits = LlamaForCausalLM.from_pretrained(model)(torch.tensor([tokenizer.encode(prompt)])).logits[0, -1]
    return logits[ids].tolist()


def test_two_tasks_in_one_start_and_none_when_all_is_answered(starts, vllm, model, tmp_path):
    heldout = list(islice(task.problems("heldout", 0), PROBLEMS))
    task.write_jsonl(map(task.prompt_row, heldout), tmp_path / "heldout.jsonl")
    questions = [{"question": f"Which? {n}", "choices": CHOICES, "answer": n % 4, "subject": "things"} for n in range(8)]
    task.write_jsonl(questions, tmp_path / "mmlu.jsonl")
    tasks = {
        "rlvr": {"data": str(tmp_path / "heldout.jsonl"), "max_tokens": 8},
        "mmlu": {"data": str(tmp_path / "mmlu.jsonl"), "shots": 0},
    }
    settings = EvalSettings(model={"path": str(model), "dtype": "fp32"}, output=str(tmp_path / "eval"), tasks=tasks)
    results = evaluate(settings)["tasks"]
    assert len(starts) == 1

    answered = [json.loads(line) for line in (tmp_path / "eval/samples/rlvr.jsonl").read_text().splitlines()]
    right = [task.is_correct(row["responses"][0]["response"], row["answer"]) for row in answered]
    assert len(right) == PROBLEMS and results["rlvr"]["metrics"]["score"]["value"] == sum(right) / PROBLEMS

    chosen = [json.loads(line) for line in (tmp_path / "eval/samples/mmlu.jsonl").read_text().splitlines()]
    for row in chosen:
        (response,) = row["responses"]
        scores = letters(model, f"<|user|>\n{row['messages'][0]['content']}\n<|assistant|>\n")
        assert response["response"] == "ABCD"[scores.index(max(scores))], "the letter with the highest log-probability"
    expected = sum(row["responses"][0]["response"] == row["answer"] for row in chosen) / 8
    assert results["mmlu"]["metrics"]["accuracy"]["value"] == expected

    assert evaluate(settings)["tasks"] == results and len(starts) == 1


def test_a_part_of_the_prompts_is_answered_as_in_the_whole(vllm):
    prompts, sampling = [[5, 6, 7], [40, 41, 42], [300, 9]], Sampling(max_tokens=8, temperature=1.0, samples=2, seed=3)
    whole = vllm(prompts, sampling)
    assert vllm(prompts[1:], sampling, numbers=[1, 2]) == whole[1:]
    assert vllm(prompts[1:], sampling) != whole[1:], "their numbers matter"
