"""Reward models of every family: their tensors, their config.json, what they refuse."""

from __future__ import annotations

import pytest

from tulu_mega.bridge.box import Box
from tulu_mega.bridge.families import FAMILIES, REWARD_FAMILIES, family_for
from tulu_mega.bridge.families.reward import check_language_model, reward_fields
from tulu_mega.bridge.files.hf_files import HfCheckpoint, TensorInfo
from tulu_mega.bridge.rules import Piece
from tulu_mega.distributed.grid import ShardGrid
from tulu_mega.errors import UserError

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 11,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
REWARD = CONFIG | {"architectures": ["LlamaForSequenceClassification"], "id2label": {"0": "LABEL_0"}}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("architecture", REWARD_FAMILIES)
def test_the_tensors_are_those_of_transformers(architecture, tied):
    import torch
    import transformers

    model = getattr(transformers, architecture)
    sizes = {name: size for name, size in CONFIG.items() if name != "architectures"}
    config = model.config_class(**sizes, head_dim=6, tie_word_embeddings=tied, pad_token_id=None, num_labels=1)
    with torch.device("meta"):
        theirs = {name: tuple(tensor.shape) for name, tensor in model(config).state_dict().items()}
    assert REWARD_FAMILIES[architecture].hf_shapes(config.to_dict()) == theirs


def test_every_family_has_them():
    named = {architecture.replace("ForCausalLM", "ForSequenceClassification") for architecture in FAMILIES}
    assert set(REWARD_FAMILIES) == named
    assert not any(family.reward for family in FAMILIES.values()) and all(each.reward for each in REWARD_FAMILIES.values())


@pytest.mark.parametrize("tied", [False, True])
def test_the_head_is_whole_on_every_rank_and_never_the_embedding(tied):
    config = REWARD | {"tie_word_embeddings": tied}
    family, hidden = family_for(config), CONFIG["hidden_size"]
    for rank in range(2):
        piece = Piece("score.weight", Box.whole((1, hidden)), Box.whole((1, hidden)))
        assert family.pieces("output_layer.weight", config, ShardGrid(tensor=2, rank=rank)) == [piece]
    assert "lm_head.weight" in family.ignorable(config)


SEVERAL = [({"id2label": {"0": "bad", "1": "good"}}, 2), ({"id2label": None, "num_labels": 5}, 5), ({"id2label": None}, 2)]


@pytest.mark.parametrize(("labels", "count"), SEVERAL)
def test_other_numbers_of_labels_are_refused(labels, count):
    config = REWARD | labels
    with pytest.raises(UserError, match=rf"LlamaForSequenceClassification has {count} labels .*, expected 1"):
        family_for(config).hf_shapes(config)


def test_fields_of_a_reward_model_made_from_a_language_model():
    family = family_for(CONFIG)
    made = reward_fields(family, CONFIG | {"tie_word_embeddings": True, "pad_token_id": 7, "eos_token_id": [2, 3]})
    assert made == {
        "architectures": ["LlamaForSequenceClassification"],
        "tie_word_embeddings": False,
        "id2label": {"0": "LABEL_0"},
        "label2id": {"LABEL_0": 0},
    }
    assert reward_fields(family, CONFIG | {"pad_token_id": 3, "eos_token_id": [2, 3]})["pad_token_id"] is None


def test_a_reward_model_keeps_the_name_of_its_label():
    config = REWARD | {"id2label": {"0": "reward"}, "label2id": {"reward": 0}, "pad_token_id": 7, "eos_token_id": 2}
    again = config | reward_fields(family_for(config), config)
    assert again["id2label"] == {"0": "reward"} and again["architectures"] == ["LlamaForSequenceClassification"]
    assert again["pad_token_id"] == 7


def test_a_classifier_is_no_language_model():
    check_language_model("here", ["LlamaForCausalLM"])
    check_language_model("here", None)
    with pytest.raises(UserError, match=r"model.path = here: is a GemmaForSequenceClassification, .*give a language model"):
        check_language_model("here", ["GemmaForSequenceClassification"])


@pytest.mark.parametrize("family", FAMILIES.values(), ids=lambda family: family.architecture)
def test_buffers_of_rotary_embeddings_are_nobodys(family, tmp_path):
    """Older versions of transformers stored them; it and vLLM pass them over, whatever the family."""
    checkpoint = HfCheckpoint(tmp_path, {}, {"model.layers.0.self_attn.rotary_emb.inv_freq": TensorInfo("F32", (4,))})
    assert checkpoint.check({}, family.ignorable({})) == []
    assert checkpoint.check({}, ()) != []
