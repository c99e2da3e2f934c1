"""What TRL's GRPOTrainer makes of a few groups: run by the interpreter of the peers' environment, see test_policy_trl.py.

    python trl_policy_losses.py DIRECTORY

Writes the policy into the directory and prints one JSON object: the groups with what each token was given, and for each case
loss and gradient norm of one batch by the trainer's `_compute_loss`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import GRPOConfig, GRPOTrainer

VOCAB, TEMPERATURE, MAX_TOKENS = 96, 0.8, 16
LENGTHS = [(5, 7), (5, 3), (2, 12), (2, 1)]
"""of prompt and response"""
ADVANTAGES = [1.3, -0.4, 0.9, -1.1]
CASES = {
    "grpo, token": dict(loss_type="dapo", epsilon=0.2, epsilon_high=0.28, beta=0.05),
    "grpo, sequence": dict(loss_type="grpo", epsilon=0.2, beta=0.05),
    "grpo, constant": dict(loss_type="dr_grpo", epsilon=0.2, beta=0.05),
    "grpo, token, entropy": dict(loss_type="dapo", epsilon=0.2, beta=0.0, entropy_coef=0.3),
    "cispo, token": dict(loss_type="cispo", epsilon_high=1.28, beta=0.0),
    "gspo, sequence": dict(loss_type="grpo", importance_sampling_level="sequence", epsilon=0.03, epsilon_high=0.04, beta=0.05),
    "gspo, token": dict(loss_type="dapo", importance_sampling_level="sequence", epsilon=0.03, epsilon_high=0.04, beta=0.0),
    "grpo, token, weights by token": dict(loss_type="dapo", epsilon=0.2, beta=0.05, level="token", cap=1.5),
    "grpo, sequence, weights by response": dict(loss_type="grpo", epsilon=0.2, beta=0.05, level="sequence", cap=1.5),
    "grpo, token, tokens left out": dict(loss_type="dapo", epsilon=0.2, beta=0.05, level="token mask", cap=1.5),
}


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
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(directory / "policy")
    generator = torch.Generator().manual_seed(3)
    rows = [[torch.randint(2, VOCAB, (n,), generator=generator).tolist() for n in lengths] for lengths in LENGTHS]
    width = max(prompt for prompt, _ in LENGTHS), max(response for _, response in LENGTHS)
    inputs = {
        "prompt_ids": torch.tensor([[0] * (width[0] - len(prompt)) + prompt for prompt, _ in rows]),
        "prompt_mask": torch.tensor([[0] * (width[0] - n) + [1] * n for n, _ in LENGTHS]),
        "completion_ids": torch.tensor([response + [0] * (width[1] - len(response)) for _, response in rows]),
        "completion_mask": torch.tensor([[1] * n + [0] * (width[1] - n) for _, n in LENGTHS]),
        "advantages": torch.tensor(ADVANTAGES),
        "num_items_in_batch": torch.tensor(float(sum(n for _, n in LENGTHS))),
    }
    answers, given = {}, None
    for name, settings in CASES.items():
        level, cap = settings.pop("level", None), settings.pop("cap", None)
        trainer = GRPOTrainer(
            LlamaForCausalLM.from_pretrained(directory / "policy"),
            reward_funcs=lambda completions, **_: [0.0] * len(completions),
            args=GRPOConfig(
                output_dir=str(directory / "run"), use_cpu=True, bf16=False, gradient_checkpointing=False, report_to="none",
                temperature=TEMPERATURE, max_completion_length=MAX_TOKENS, per_device_train_batch_size=4, num_generations=2,
                use_bias_correction_kl=False,  # else the estimate of the divergence is multiplied by the ratio
                **settings,
            ),
            train_dataset=Dataset.from_list([{"prompt": "w5 w6"}] * 4), processing_class=tokenizer,
        )  # fmt: skip
        if given is None:
            given = _columns(trainer, inputs, generator)
        mask = inputs["completion_mask"]
        extra = {"old_per_token_logps": given["old"], "ref_per_token_logps": given["ref"]}
        if level:  # as `_generate_and_score_completions` has them
            difference = (given["old"] - given["sampler"]) * mask
            ratio = (difference.sum(-1, keepdim=True) if level == "sequence" else difference).exp()
            out_of_range = (ratio < 1 / cap) | (ratio > cap)
            extra["importance_sampling_ratio"] = ratio.masked_fill(out_of_range, 0) if "mask" in level else ratio.clamp(max=cap)
            trainer.use_vllm = True
        trainer.current_gradient_accumulation_steps = 1
        trainer.model.train()
        loss = trainer._compute_loss(trainer.model, inputs | extra)
        loss.backward()
        squares = sum(float(p.grad.double().pow(2).sum()) for p in trainer.model.parameters() if p.grad is not None)
        answers[name] = {"loss": float(loss.detach()), "grad_norm": squares**0.5}
    columns = {name: [row[:n].tolist() for row, (_, n) in zip(value, LENGTHS, strict=True)] for name, value in given.items()}
    found = {"rows": rows, "advantages": ADVANTAGES, "temperature": TEMPERATURE, "max_tokens": MAX_TOKENS}
    print("@" + json.dumps(found | {"columns": columns, "answers": answers}))


def _columns(trainer, inputs, generator) -> dict[str, torch.Tensor]:
    """What other weights and another program might have given: the policy's own, moved a little."""
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
    with torch.no_grad():
        own, *_ = trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, inputs["completion_ids"].shape[1])
    old = own + 0.25 * torch.randn(own.shape, generator=generator)
    return {
        "old": old,
        "sampler": old + 0.4 * torch.randn(own.shape, generator=generator),
        "ref": own + 0.3 * torch.randn(own.shape, generator=generator),
    }


if __name__ == "__main__":
    main(Path(sys.argv[1]))
