"""Runs that train with another tokenizer than the model's own: who loads what they export has that tokenizer, and generation ends
at its eos."""

from __future__ import annotations

import itertools
import json
import os
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, LogitsProcessorList

from tests.lib import world
from tests.lib.tokenizers import byte_tokenizer
from tulu_mega.config import CheckpointSettings, DpoSettings, RmSettings, SftSettings
from tulu_mega.data.tulu_template import TULU_CHAT_TEMPLATE
from tulu_mega.launch.launcher import World
from tulu_mega.preflight import check
from tulu_mega.quickstart import task, tiny_model

pytestmark = pytest.mark.ranks

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}[{{ message['role'] }}]{% if message['role'] == 'assistant' %}{% generation %}"
    "{{ message['content'] + eos_token }}{% endgeneration %}{% else %}{{ message['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
TURNS = [{"role": "user", "content": "Wie groß?\n\n  12,5 m"}, {"role": "assistant", "content": "hi bye"}]


@pytest.fixture(scope="module")
def material(tmp_path_factory) -> Path:
    """A model without a chat template, as base models are; another tokenizer, which has one; conversations and pairs."""
    directory = tmp_path_factory.mktemp("material")
    tiny_model.make(directory / "model", seed=0)
    (directory / "model/chat_template.jinja").unlink()
    tokenizer = byte_tokenizer(bos_token="<s>", eos_token="<|im_end|>", pad_token="<|pad|>")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(directory / "tokenizer")
    rows = list(itertools.islice(task.demonstrations(seed=0), 16))
    wrong = [[row["messages"][0], {"role": "assistant", "content": "No."}] for row in rows]
    pairs = [{"chosen": row["messages"], "rejected": other} for row, other in zip(rows, wrong, strict=True)]
    for name, content in (("sft", rows), ("pairs", pairs)):
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    return directory


def on_rank(stage: str, settings) -> None:
    from tulu_mega.recipes import dpo, rm, sft

    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    {"sft": sft, "rm": rm, "dpo": dpo}[stage].run(settings, World(rank, size, rank, size, 1))


def trained(material: Path, run_dir: Path, stage: str, template: str, **data) -> Path:
    """The directory that two steps export."""
    kind = {"sft": SftSettings, "rm": RmSettings, "dpo": DpoSettings}[stage]
    given = {
        "model": {"path": str(material / "model"), "dtype": "fp32"},
        "run_dir": str(run_dir),
        "data": {
            "train": str(material / ("sft.jsonl" if stage == "sft" else "pairs.jsonl")), "template": template, "max_length": 512,
            "tokenizer": str(material / "tokenizer"), **data,
        },
        "train": {"steps": 2, "global_batch": 4},
        "parallel": {"tensor": 2},
    }  # fmt: skip
    settings = kind.model_validate(given)
    check.ready(settings)
    world.run(2, on_rank, stage, settings)
    return run_dir / "hf"


@pytest.mark.parametrize(("stage", "template"), [("sft", "tokenizer"), ("sft", "tulu"), ("dpo", "tokenizer")])
def test_a_language_model(material, tmp_path, stage, template):
    exported = trained(material, tmp_path / "run", stage, template)
    ours, theirs = AutoTokenizer.from_pretrained(exported), AutoTokenizer.from_pretrained(material / "tokenizer")
    assert ours.chat_template == (TEMPLATE if template == "tokenizer" else TULU_CHAT_TEMPLATE)
    assert ours.backend_tokenizer.to_str() == theirs.backend_tokenizer.to_str()
    theirs.chat_template = ours.chat_template
    ids = ours.apply_chat_template(TURNS)["input_ids"]
    assert ids == theirs.apply_chat_template(TURNS)["input_ids"] and theirs.eos_token_id in ids

    model = AutoModelForCausalLM.from_pretrained(exported)

    def third_is_eos(ids, scores):
        scores[:, theirs.eos_token_id] = 1e9 if ids.shape[1] == len(prompt) + 2 else -1e9
        return scores

    prompt = ours("Wie")["input_ids"]
    (found,) = model.generate(
        torch.tensor([prompt]), max_new_tokens=8, do_sample=False, logits_processor=LogitsProcessorList([third_is_eos])
    ).tolist()
    assert len(found) == len(prompt) + 3 and found[-1] == theirs.eos_token_id


def test_a_reward_model(material, tmp_path):
    """Padding changes no score: it is the tokenizer's."""
    exported = trained(material, tmp_path / "run", "rm", "tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(exported)
    assert tokenizer.chat_template == TEMPLATE and tokenizer.eos_token == "<|im_end|>"
    model = AutoModelForSequenceClassification.from_pretrained(exported)
    assert model.config.pad_token_id == tokenizer.pad_token_id
    texts = ["hi<|im_end|>", "hi there, how are you?<|im_end|>"]
    with torch.no_grad():
        together = model(**tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")).logits
        alone = [model(**tokenizer(text, return_tensors="pt")).logits[0] for text in texts]
    assert together[0, 0] != together[1, 0] and torch.allclose(together, torch.stack(alone), atol=1e-5)


def test_the_model_s_own_tokenizer_goes_with_it_as_before(material, tmp_path):
    exported = trained(material, tmp_path / "run", "sft", "tulu", tokenizer=None)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (exported / name).read_bytes() == (material / "model" / name).read_bytes()
    assert AutoTokenizer.from_pretrained(exported).chat_template == TULU_CHAT_TEMPLATE


def refused(settings) -> list[str]:
    from tulu_mega.errors import UserError

    try:
        on_rank("sft", settings)
    except UserError as error:
        return error.problems
    return []


def test_one_that_cannot_go_with_the_model_is_told_by_check_and_on_every_rank_before_training(material, tmp_path):
    rows = tmp_path / "tokens.jsonl"  # nothing is tokenised, so nothing else would notice
    rows.write_text(json.dumps({"input_ids": [5, 6, 7], "labels": [5, 6, 7]}) + "\n")
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([f"<|{number}|>" for number in range(400)], special_tokens=True)
    tokenizer.eos_token = "<|399|>"
    tokenizer.save_pretrained(tmp_path / "large")
    settings = SftSettings.model_validate(
        {
            "model": {"path": str(material / "model"), "dtype": "fp32"},
            "run_dir": str(tmp_path / "run"),
            "data": {"train": str(rows), "tokenizer": str(tmp_path / "large")},
            "train": {"steps": 1, "global_batch": 1},
            "parallel": {"tensor": 2},
        }
    )
    told = check.check(settings)
    assert len(told) == 1 and "its eos token '<|399|>' is number" in told[0]
    check.ready(settings.model_copy(update={"checkpoint": CheckpointSettings(export=False)}))
    for problems in world.run(2, refused, settings):
        assert len(problems) == 1 and "its eos token '<|399|>' is number" in problems[0]
    assert not (tmp_path / "run/metrics.jsonl").exists()
