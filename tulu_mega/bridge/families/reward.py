"""Reward models (``*ForSequenceClassification`` with one label) of every family: its decoder, and a head that gives a score."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from typing import Any

from tulu_mega.bridge.rules import Config, Cut, Family, Rule, Sizes
from tulu_mega.errors import UserError

_HEAD = Rule(("output_layer.weight",), {"score.weight": ("scores", "hidden")}, Cut.COPY)
_LANGUAGE_MODEL, _CLASSIFIER = "ForCausalLM", "ForSequenceClassification"


def reward_family(family: Family) -> Family:
    """The reward models of a family of language models, whose head may lie in their checkpoints and is not needed."""
    return replace(
        family,
        architecture=architecture(family),
        rules=(*(rule for rule in family.rules if family.head not in rule.hf), _HEAD),
        sizes=partial(_sizes, family),
        head="score.weight",
        leftovers=(*family.leftovers, family.head),
        reward=True,
    )


def architecture(family: Family) -> str:
    """What transformers calls the reward models of a family."""
    return family.architecture.removesuffix(_LANGUAGE_MODEL).removesuffix(_CLASSIFIER) + _CLASSIFIER


def reward_fields(family: Family, config: Config) -> dict[str, Any]:
    """What config.json of a reward model says otherwise than that of the model it was made from.

    Transformers reads a score at the last token that is not padding: a padding token that ends texts too would let it read the
    wrong one, so there is none then.

    Args:
        family: of the model it was made from; a reward model itself is fine.
        config: that model's config.json.
    """
    labels = {} if family.reward else {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
    ends = config.get("eos_token_id")
    shared = config.get("pad_token_id") in (ends if isinstance(ends, list) else [ends])
    padding = {"pad_token_id": None} if shared else {}
    return {"architectures": [architecture(family)], "tie_word_embeddings": False, **labels, **padding}


def check_language_model(path: str, architectures: Iterable[str] | None) -> None:
    """For commands that want a head over the vocabulary.

    Args:
        path: the model, as the user gave it.
        architectures: of its config.json.

    Raises:
        UserError: it is a reward model, or another classifier.
    """
    named = [each for each in architectures or () if str(each).endswith(_CLASSIFIER)]
    if named:
        raise UserError(
            f"model.path = {path}: is a {named[0]}, whose head gives scores instead of tokens; "
            f"give a language model (...{_LANGUAGE_MODEL})"
        )


def _sizes(family: Family, config: Config) -> Sizes:
    labels = config.get("id2label")
    if labels is not None and not isinstance(labels, dict):
        raise UserError(f"config.json: id2label = {str(labels)[:100]}, expected an object of labels by number")
    count = len(labels) if labels is not None else config.get("num_labels", 2)  # where nothing is said transformers takes two
    if count != 1:
        raise UserError(
            f"config.json: {architecture(family)} has {count} labels (id2label or num_labels), expected 1; "
            "only models that give one score are reward models"
        )
    return {**family.sizes(config), "scores": 1}
