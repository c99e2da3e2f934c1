"""What TRL's own trainers make of a few pairs: run by the interpreter of the peers' environment, see test_trl_oracle.py.

    python trl_losses.py DIRECTORY

Writes the models into the directory and prints one JSON object: the tokenised pairs, and for each case loss and gradient norm of
one batch by the trainer's `compute_loss`.
"""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

VOCAB = 96
LENGTHS = [(5, 7, 3), (2, 4, 12), (9, 9, 9), (3, 1, 6)]
"""of prompt, chosen, rejected"""
MARGINS = [0.5, 0.0, 1.25, 0.3]
DPO = {
    "dpo": dict(loss_type=["sigmoid"], beta=0.1),
    "dpo_norm": dict(loss_type=["sigmoid_norm"], beta=5.0),
    "ipo": dict(loss_type=["ipo"], beta=0.3),
    "apo_zero": dict(loss_type=["apo_zero"], beta=0.1),
    "dpo with SFT term": dict(loss_type=["sigmoid", "sft"], loss_weights=[1.0, 0.7], beta=0.1),
}
CPO = {
    "simpo": dict(loss_type="simpo", beta=2.0, simpo_gamma=0.6, cpo_alpha=0.0),
    "simpo, labels smoothed": dict(loss_type="simpo", beta=2.0, simpo_gamma=0.6, cpo_alpha=0.0, label_smoothing=0.2),
    "dpo without reference, labels smoothed": dict(loss_type="sigmoid", beta=0.1, cpo_alpha=0.0, label_smoothing=0.2),
}
ORPO = {"orpo, odds ratio": dict(beta=0.4)}


class OddsRatio(ORPOTrainer):
    """ORPO without its likelihood term, which TRL takes over the chosen side's prompt and response and we over the response."""

    def concatenated_forward(self, *given):
        *kept, likelihood = super().concatenated_forward(*given)
        return (*kept, 0 * likelihood)


def main(directory: Path) -> None:
    torch.set_num_threads(1)
    words = {"<pad>": 0, "</s>": 1, **{f"w{n}": n for n in range(2, VOCAB)}}
    plain = Tokenizer(models.WordLevel(words, unk_token="</s>"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="<pad>", eos_token="</s>")
    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=VOCAB,
        max_position_embeddings=128, initializer_range=0.3, pad_token_id=0, eos_token_id=1, bos_token_id=None,
    )  # fmt: skip
    policy, reference = _seeded(LlamaForCausalLM, config, 0), _seeded(LlamaForCausalLM, config, 1)
    scorer = _seeded(LlamaForSequenceClassification, copy.deepcopy(config), 2, num_labels=1)
    for name, model in (("policy", policy), ("reference", reference), ("scorer", scorer)):
        model.save_pretrained(directory / name)
    generator = torch.Generator().manual_seed(3)
    rows = [
        dict(zip(("prompt", "chosen", "rejected"), (_words(length, generator) for length in lengths), strict=True))
        for lengths in LENGTHS
    ]
    common = dict(output_dir=str(directory / "run"), use_cpu=True, bf16=False, gradient_checkpointing=False, report_to="none")
    answers, pairs = {}, []
    for name, settings in DPO.items():
        # TRL takes the SFT term's mean over the tokens of all pairs, we over each response's: the same of one pair
        data = Dataset.from_list(rows[:1] if "SFT" in name else rows)
        model = copy.deepcopy(policy)
        trainer = DPOTrainer(
            model, ref_model=copy.deepcopy(reference), args=DPOConfig(**common, **settings), train_dataset=data,
            processing_class=tokenizer,
        )  # fmt: skip
        made = list(trainer.train_dataset)
        pairs = made if len(made) == len(rows) else pairs
        answers[name] = _loss(trainer, made)
    without = [(name, CPOTrainer, CPOConfig(**common, **settings)) for name, settings in CPO.items()]
    without += [(name, OddsRatio, ORPOConfig(**common, **settings)) for name, settings in ORPO.items()]
    for name, kind, args in without:
        trainer = kind(copy.deepcopy(policy), args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
        answers[name] = _loss(trainer, list(trainer.train_dataset))
        sides = [(row["chosen_input_ids"], row["rejected_input_ids"]) for row in trainer.train_dataset]
        assert sides == [(row["prompt_ids"] + row["chosen_ids"], row["prompt_ids"] + row["rejected_ids"]) for row in pairs]
    scored = [
        {"chosen_ids": row["prompt_ids"] + row["chosen_ids"], "rejected_ids": row["prompt_ids"] + row["rejected_ids"]}
        for row in pairs
    ]
    for name, margins in (("reward", None), ("reward with margins", MARGINS)):
        data = [row | ({"margin": margins[at]} if margins else {}) for at, row in enumerate(scored)]
        trainer = RewardTrainer(
            copy.deepcopy(scorer), args=RewardConfig(**common), train_dataset=Dataset.from_list(data), processing_class=tokenizer
        )
        answers[name] = _loss(trainer, list(trainer.train_dataset))
    kept = [{name: row[name] for name in ("prompt_ids", "chosen_ids", "rejected_ids")} for row in pairs]
    print("@" + json.dumps({"pairs": kept, "margins": MARGINS, "answers": answers}))


def _seeded(kind, config: LlamaConfig, seed: int, **changes):
    torch.manual_seed(seed)
    for name, value in changes.items():
        setattr(config, name, value)
    return kind(config)


def _words(length: int, generator: torch.Generator) -> str:
    return "".join(f" w{n}" for n in torch.randint(2, VOCAB, (length,), generator=generator).tolist())


def _loss(trainer, rows: list[dict]) -> dict[str, float]:
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, trainer._prepare_inputs(trainer.data_collator(rows)))
    loss.backward()
    squares = sum(float(p.grad.double().pow(2).sum()) for p in trainer.model.parameters() if p.grad is not None)
    return {"loss": float(loss.detach()), "grad_norm": squares**0.5}


if __name__ == "__main__":
    main(Path(sys.argv[1]))
