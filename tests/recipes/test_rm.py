"""Reward models: every layout against transformers and torch autograd; made from language models, written, read, converted."""

from __future__ import annotations

import itertools
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.lib import families, reward_models, world
from tests.lib.layouts import FEW, LAYOUTS, size, weights
from tests.lib.truths import Truths
from tulu_mega.config import GenerateSettings, ModelSettings, RmSettings, ScoreSettings, SftSettings, load
from tulu_mega.convert.run import run as convert
from tulu_mega.convert.settings import ConvertSettings
from tulu_mega.errors import UserError
from tulu_mega.inference.generate import generate
from tulu_mega.preflight import check as preflight

pytestmark = pytest.mark.ranks

STEPS, LR = 10, 0.02
PAIRWISE = [  # family, layout, micro-batches, recompute
    ("Llama", "TP1", 2, "none"),
    ("Llama", "TP2", 3, "full"),
    ("Llama tied", "TP2 without SP", 2, "none"),
    ("Llama tied", "PP2", 3, "selective"),
    ("Llama tied", "PP2xVPP2", 2, "none"),
    ("Llama", "CP2", 2, "none"),
    ("Llama", "DP2", 1, "none"),
    ("OLMo 2", "TP2xPP2", 2, "none"),
    ("OLMo 2", "TP2 without SP", None, "selective"),
    ("Qwen 3", "TP4", 3, "none"),
    ("Qwen 3", "PP2xCP2", 2, "full"),
]
_TURNS = itertools.cycle([(3, "none"), (1, "selective"), (None, "full"), (4, "none")])
_EVEN = itertools.cycle([(2, "none"), (4, "selective"), (None, "full")])  # for the interleaved schedule
GRID = [
    (family, name, *next(_EVEN if "virtual_pipeline" in layout else _TURNS))
    for family, (name, layout) in itertools.product([*families.LLAMAS, *families.FAMILIES], LAYOUTS.items())
]


@pytest.fixture(scope="module")
def truth(tmp_path_factory):
    """Transformers' answers for each family and number of steps."""

    def answers(model: str, trained: str, steps: int):
        return world.run(1, reward_models.hugging_face, model, steps, LR, trained)[0]

    return Truths(tmp_path_factory, reward_models.make_model, answers)


@pytest.fixture(scope="module")
def language_model(tmp_path_factory):
    """A tied one, whose head is the embedding."""
    directory = str(tmp_path_factory.mktemp("language") / "model")
    world.run(1, families.make_language_model, directory, "Llama tied")
    return directory


def together(ranks) -> dict[int, float]:
    return {row: score for found in ranks for row, score in found.items()}


def config_of(directory) -> dict:
    return json.loads((Path(directory) / "config.json").read_text())


def apart(ours, theirs) -> dict[str, float]:
    """How far tensors are from others, relatively."""
    assert ours.keys() == theirs.keys()
    return {
        name: np.linalg.norm(ours[name].astype(np.float64) - value) / np.linalg.norm(value.astype(np.float64))
        for name, value in theirs.items()
    }


def check(truth, tmp_path, family, name, micro_batches, recompute, steps=STEPS):
    layout = LAYOUTS[name]
    model, trained, want = truth(family, steps)
    out = str(tmp_path / "trained")
    ranks = world.run(size(layout), reward_models.engine, model, layout, micro_batches, steps, LR, out, recompute)

    found = together(rank["scores"] for rank in ranks)
    assert found.keys() == want["scores"].keys()
    np.testing.assert_allclose([found[row] for row in want["scores"]], list(want["scores"].values()), rtol=0, atol=2e-5)
    for rank in ranks:  # every rank knows loss and norm
        np.testing.assert_allclose(rank["losses"][0], want["losses"][0], rtol=1e-6)
        np.testing.assert_allclose(rank["norms"][0], want["norms"][0], rtol=1e-5)
        assert rank["losses"] == ranks[0]["losses"]
    far = {key: difference for key, difference in apart(weights(out), weights(trained)).items() if difference > 1e-5}
    assert not far


@pytest.mark.parametrize(("family", "layout", "micro_batches", "recompute"), PAIRWISE)
def test_layout_equals_transformers(truth, tmp_path, family, layout, micro_batches, recompute):
    check(truth, tmp_path, family, layout, micro_batches, recompute, FEW)


@pytest.mark.acceptance
@pytest.mark.parametrize(("family", "layout", "micro_batches", "recompute"), GRID)
def test_full_grid(truth, tmp_path, family, layout, micro_batches, recompute):
    check(truth, tmp_path, family, layout, micro_batches, recompute)


def test_the_truth_is_sensitive(truth):
    """Training moved every tensor, the head too, far enough for 1e-5 to mean something; float32 is exact enough for it."""
    model, trained, want = truth("Llama", FEW)
    moved = apart(weights(trained), weights(model))
    assert "score.weight" in moved and min(moved.values()) > 1e-4
    exact = world.run(1, reward_models.hugging_face, model, 1, 0.0, None, torch.float64)[0]
    assert want["losses"][0] == pytest.approx(exact["losses"][0], rel=5e-7)
    assert want["norms"][0] == pytest.approx(exact["norms"][0], rel=5e-6)


def test_bf16_under_sequence_parallelism(truth):
    """The head's arithmetic is float32 there too; what is left is the rounding of the layers."""
    model, _, want = truth("Llama", FEW)
    (first, *_) = world.run(2, reward_models.engine, model, LAYOUTS["TP2"], 2, 2, 1e-3, None, "none", "bf16")
    found = [first["scores"][row] for row in want["scores"]]
    np.testing.assert_allclose(found, list(want["scores"].values()), rtol=0, atol=0.1)
    assert any(score != float(torch.tensor(score).bfloat16()) for score in found)
    assert all(math.isfinite(each) for each in first["losses"] + first["norms"])


@pytest.mark.parametrize("layout", ["TP2", "TP2 without SP", "TP2xPP2", "PP2xVPP2", "CP2"])
def test_a_language_model_gets_a_head_that_no_layout_changes(language_model, tmp_path, layout):
    out = str(tmp_path / "out")
    ranks = world.run(size(LAYOUTS[layout]), reward_models.drawn, language_model, LAYOUTS[layout], 11, out)
    before, after = weights(language_model), weights(out)
    head = after.pop("score.weight")
    assert before.keys() == after.keys()  # of the tied one, whose head is no tensor of its own
    assert all(before[name].tobytes() == after[name].tobytes() for name in before)
    expected = torch.randn(1, 64, generator=torch.Generator().manual_seed(11)) / math.sqrt(65)
    assert head.tobytes() == expected.numpy().tobytes() and 0.7 < head.std() * math.sqrt(65) < 1.3
    heads = [shape for _, held in ranks for name, shape in held if name.startswith("output_layer")]
    assert heads and all(shape == [1, 64] for shape in heads)
    embeddings = sum("word_embeddings" in name for _, held in ranks for name, _ in held)
    assert embeddings == LAYOUTS[layout].get("tensor", 1) * LAYOUTS[layout].get("context", 1)  # on the first stage alone

    assert world.run(1, reward_models.unloaded, out) == [[]]
    ours, theirs = together(scores for scores, _ in ranks), world.run(1, reward_models.scores, out)[0]
    assert ours.keys() == theirs.keys()
    np.testing.assert_allclose([ours[row] for row in theirs], list(theirs.values()), rtol=0, atol=2e-5)


def test_an_untied_language_model_gets_the_same_head_and_another_seed_another(language_model, tmp_path):
    untied, out = str(tmp_path / "untied"), str(tmp_path / "out")
    world.run(1, families.make_language_model, untied, "Llama")
    heads = []
    for directory, seed in ((language_model, 1), (untied, 1), (untied, 2)):
        world.run(1, reward_models.drawn, directory, {}, seed, out)
        written = weights(out)
        assert "lm_head.weight" not in written
        heads.append(written["score.weight"].tobytes())
    assert heads[0] == heads[1] != heads[2]


def test_config_json_is_as_transformers_writes_it(language_model, tmp_path):
    out, theirs = tmp_path / "out", tmp_path / "theirs"
    source = config_of(language_model)
    assert source["tie_word_embeddings"] and source["pad_token_id"] is None
    world.run(1, reward_models.drawn, language_model, {}, 1, str(out))
    world.run(1, reward_models.make_model, str(theirs), "Llama tied")
    assert config_of(out) == config_of(theirs) | {"tie_word_embeddings": False}
    assert not (out / "generation_config.json").exists()


@pytest.mark.parametrize(("padding", "end", "kept"), [(7, 2, 7), (2, 2, None), (9, [2, 9], None)])
def test_a_padding_token_that_ends_texts_is_left_out(language_model, tmp_path, padding, end, kept):
    source, out = tmp_path / "source", tmp_path / "out"
    shutil.copytree(language_model, source)
    config = config_of(source) | {"pad_token_id": padding, "eos_token_id": end}
    (source / "config.json").write_text(json.dumps(config))
    world.run(1, reward_models.drawn, str(source), {}, 1, str(out))
    assert config_of(out)["pad_token_id"] == kept


def test_a_checkpoint_of_tp2_goes_on_under_pp2_with_head_and_optimizer(language_model, tmp_path):
    names = ("checkpoints", "middle", "whole", "again", "fresh")
    checkpoints, middle, whole, again, fresh = (str(tmp_path / each) for each in names)
    world.run(2, reward_models.undisturbed, language_model, LAYOUTS["TP2"], checkpoints, middle, whole)
    world.run(2, reward_models.resumed, language_model, LAYOUTS["PP2"], checkpoints, again)
    assert max(apart(weights(again), weights(whole)).values()) < 1e-6
    world.run(2, reward_models.resumed, middle, LAYOUTS["PP2"], None, fresh)  # the same weights, no moments
    lost = apart(weights(fresh), weights(whole))
    assert lost["score.weight"] > 1e-5 and max(lost.values()) > 1e-4

    [problems] = world.run(1, reward_models.foreign, language_model, checkpoints, False)
    assert "checkpoint of another model" in problems[0] and "LlamaForSequenceClassification" in problems[0]


def test_a_run_s_checkpoint_is_converted_with_the_config_of_a_reward_model(language_model, tmp_path):
    checkpoints, middle, whole, back = (tmp_path / each for each in ("checkpoints", "middle", "whole", "back"))
    world.run(1, reward_models.undisturbed, language_model, {}, str(checkpoints), str(middle), str(whole))
    (step,) = checkpoints.iterdir()
    convert(ConvertSettings(source=str(step), output=str(back), to="hf", config=str(middle), workers=1))
    before, after = weights(str(middle)), weights(str(back))
    assert before.keys() == after.keys() and all(before[name].tobytes() == after[name].tobytes() for name in before)
    with pytest.raises(UserError, match=r"output_layer\.weight"):
        untied = tmp_path / "untied"
        world.run(1, families.make_language_model, str(untied), "Llama")
        convert(ConvertSettings(source=str(step), output=str(back), to="hf", config=str(untied), workers=1))


def test_a_language_model_s_checkpoint_is_no_reward_model_s(language_model, tmp_path):
    checkpoints = str(tmp_path / "checkpoints")
    world.run(1, families.saved, language_model, {}, checkpoints)
    [problems] = world.run(1, reward_models.foreign, language_model, checkpoints, True)
    assert "checkpoint of another model" in problems[0]


@pytest.mark.parametrize("family", ["Llama tied", "OLMo 2"])
def test_convert_goes_both_ways(truth, tmp_path, family):
    model, _, want = truth(family, FEW)
    megatron, back = tmp_path / "megatron", tmp_path / "back"
    convert(ConvertSettings(source=model, output=str(megatron), to="megatron", workers=1))
    convert(ConvertSettings(source=str(megatron), output=str(back), to="hf", workers=1, verify=True))
    before, after = weights(model), weights(str(back))
    assert before.keys() == after.keys() and all(before[name].tobytes() == after[name].tobytes() for name in before)
    found = together(world.run(2, reward_models.converted, str(megatron), LAYOUTS["TP2"]))
    np.testing.assert_allclose([found[row] for row in want["scores"]], list(want["scores"].values()), rtol=0, atol=2e-5)


def test_a_converted_language_model_gets_a_head(language_model, tmp_path):
    megatron, first, second = (str(tmp_path / each) for each in ("megatron", "first", "second"))
    convert(ConvertSettings(source=language_model, output=megatron, to="megatron", workers=1))
    world.run(2, reward_models.drawn, megatron, LAYOUTS["PP2"], 3, first)
    world.run(1, reward_models.drawn, language_model, {}, 3, second)
    ours, theirs = weights(first), weights(second)
    assert ours.keys() == theirs.keys() and all(ours[name].tobytes() == theirs[name].tobytes() for name in ours)


@pytest.mark.parametrize("layout", [{"tensor": 2}, {"pipeline": 2, "virtual_pipeline": 2}, {"context": 2}, {"data": 2}], ids=str)
def test_score_gives_one_number_a_row(truth, tmp_path, layout):
    from tests.recipes.test_score import job

    model, _, _ = truth("Llama", FEW)
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    lengths = (1, 30, 2, 41, 9)
    rows = [{"id": f"row {i}", "input_ids": [(7 * i + j) % 400 for j in range(length)]} for i, length in enumerate(lengths)]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--model", model, "--model.dtype", "fp32", "--input", str(source), "--output", str(output), "--pack_length", "44"]
    flags += [part for name, ranks in layout.items() for part in (f"--parallel.{name}", str(ranks))]
    assert not preflight.check(load(ScoreSettings, None, flags))
    world.run(2, job, flags)
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert [{name: line[name] for name in line if name != "score"} for line in lines] == rows
    want = world.run(1, transformers_scores, model, [row["input_ids"] for row in rows])[0]
    assert [line["score"] for line in lines] == pytest.approx(want, abs=2e-5)


def transformers_scores(model, texts):
    from transformers import AutoModelForSequenceClassification

    network = AutoModelForSequenceClassification.from_pretrained(model, dtype=torch.float32)
    with torch.no_grad():
        return [float(network(torch.tensor([ids])).logits[0, 0]) for ids in texts]


def test_commands_for_language_models_refuse_it(truth, tmp_path):
    model, _, _ = truth("Llama", FEW)
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps({"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}) + "\n")
    sft = load(SftSettings, None, ["--model", model, "--data.train", str(data), "--run_dir", str(tmp_path / "run")])
    told = f"model.path = {model}: is a LlamaForSequenceClassification, whose head gives scores instead of tokens"
    assert any(problem.startswith(told) for problem in preflight.check(sft))
    wanted = GenerateSettings(model=ModelSettings(path=model), input=str(data))
    assert any(problem.startswith(told) for problem in preflight.check(wanted))
    with pytest.raises(UserError, match="whose head gives scores instead of tokens"):
        generate(wanted)
    [problems] = world.run(1, reward_models.refused, model, False)
    assert problems[0].startswith(told)


def test_a_classifier_of_several_labels_is_refused(tmp_path):
    model = str(tmp_path / "model")
    world.run(1, reward_models.make_model, model, "Llama", 8, 3)
    says = "LlamaForSequenceClassification has 3 labels (id2label or num_labels), expected 1"
    [problems] = world.run(1, reward_models.refused, model, None)
    assert says in problems[0]
    score = load(ScoreSettings, None, ["--model", model, "--input", "absent.jsonl", "--output", str(tmp_path / "out.jsonl")])
    assert any(says in problem for problem in preflight.check(score))


def test_rm_takes_either_directory_and_tokenised_pairs_without_a_tokenizer(truth, language_model, tmp_path):
    pairs = [{
        "chosen_input_ids": [1, 2, 3], "chosen_labels": [-100, 2, 3], "rejected_input_ids": [1, 4], "rejected_labels": [-100, 4],
    }]  # fmt: skip
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in pairs))
    flags = ["--data.train", str(data), "--run_dir", str(tmp_path / "run")]
    for model in (truth("Llama", FEW)[0], language_model):
        assert not preflight.check(load(RmSettings, None, ["--model", model, *flags]))
