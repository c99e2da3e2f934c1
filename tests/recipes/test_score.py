"""`score` under several layouts against transformers."""

from __future__ import annotations

import json

import pytest
import torch

from tests.lib import adapter_files, jobs, world
from tulu_mega.config import ScoreSettings, load
from tulu_mega.convert.run import run as convert
from tulu_mega.convert.settings import ConvertSettings
from tulu_mega.quickstart import tiny_model

pytestmark = pytest.mark.ranks


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("score") / "model"
    tiny_model.make(directory, seed=0)
    return directory


def rows():
    conversation = [{"role": "user", "content": "Ben has 3 stones."}, {"role": "assistant", "content": "The answer is 3."}]
    made = [
        {"id": "a", "messages": conversation},
        {"text": "Leo buys 5 shells"},
        {"id": 7, "input_ids": [5, 9, 200, 31]},
        {"text": "x"},  # perhaps a single token: no log-prob at all
        {"id": None, "input_ids": [17]},
    ]
    return made + [{"id": i, "input_ids": [(7 * i + j) % 400 for j in range(2 + i % 40)]} for i in range(30)]


def job(flags):
    import os

    from tulu_mega.launch.launcher import World
    from tulu_mega.recipes import score

    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    settings = load(ScoreSettings, None, flags)
    score.run(settings, World(rank, size, rank, size, size // settings.parallel.model_parallel))


def reference(model, scored):
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    for row in scored:
        ids = torch.tensor(row["input_ids"])
        with torch.no_grad():
            logp = network(ids[None]).logits[0, :-1].log_softmax(-1)
        yield logp.gather(1, ids[1:, None]).squeeze(1).tolist()


@pytest.mark.parametrize("layout", [{"tensor": 2}, {"pipeline": 3}, {"data": 2}, {"context": 2}], ids=str)
def test_scores_are_those_of_transformers(model, tmp_path, layout):
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows()))
    flags = ["--model", str(model), "--model.dtype", "fp32", "--input", str(source), "--output", str(output)]
    flags += ["--pack_length", "64"] + [part for name, size in layout.items() for part in (f"--parallel.{name}", str(size))]
    world.run(next(iter(layout.values())), job, flags)

    scored = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row.get("id", "absent") for row in scored] == [row.get("id", "absent") for row in rows()]
    assert [row["input_ids"] for row in scored if "text" not in row][2:] and not (tmp_path / "out.jsonl.partial").exists()
    for row, given, want in zip(scored, rows(), reference(model, scored), strict=True):
        if "input_ids" in given:
            assert row["input_ids"] == given["input_ids"]
        assert len(row["logprobs"]) == len(row["input_ids"]) - 1
        assert row["logprobs"] == pytest.approx(want, abs=2e-5)
        assert row["sum"] == pytest.approx(sum(want), abs=2e-4)


def test_adapters_are_put_beside_the_weights(model, tmp_path):
    adapter = adapter_files.make(tmp_path / "adapter", model)
    convert(ConvertSettings(source=str(model), output=str(tmp_path / "merged"), to="hf", adapter=str(adapter), workers=1))
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows()[:8]))
    flags = ["--model", str(model), "--model.dtype", "fp32", "--input", str(source), "--output", str(output)]
    world.run(2, job, [*flags, "--adapter", str(adapter), "--parallel.tensor", "2"])
    scored = [json.loads(line) for line in output.read_text().splitlines()]
    moved = 0.0
    for row, want, bare in zip(scored, reference(tmp_path / "merged", scored), reference(model, scored), strict=True):
        assert row["logprobs"] == pytest.approx(want, abs=5e-5)
        moved = max([moved, *(abs(one - other) for one, other in zip(want, bare, strict=True))])
    assert moved > 0.1


def test_an_interleaved_pipeline_scores_any_number_of_texts(tmp_path):
    """Its schedule takes micro-batches in multiples of the pipeline's ranks only: empty ones fill up."""
    model, source, output = tmp_path / "model", tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    world.run(1, jobs.make_model, str(model), False)
    lengths = [30, 2, 41]
    texts = [{"id": i, "input_ids": [(7 * i + j) % 400 for j in range(length)]} for i, length in enumerate(lengths)]
    source.write_text("".join(json.dumps(row) + "\n" for row in texts))
    flags = ["--model", str(model), "--model.dtype", "fp32", "--input", str(source), "--output", str(output)]
    flags += ["--pack_length", "44", "--parallel.pipeline", "2", "--parallel.virtual_pipeline", "2", "--parallel.context", "2"]
    world.run(4, job, flags)
    scored = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["input_ids"] for row in scored] == [row["input_ids"] for row in texts]
    for row, want in zip(scored, reference(model, scored), strict=True):
        assert row["logprobs"] == pytest.approx(want, abs=2e-5)
