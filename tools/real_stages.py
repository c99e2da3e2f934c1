"""What the stages of `tools/real.py` train with, as TOML for the real commands, and how much of everything."""

from __future__ import annotations

from dataclasses import dataclass

from real_data import Amounts


@dataclass(frozen=True)
class Sizes:
    """How much is done: rows, steps and tokens."""

    amounts: Amounts
    sft_steps: int
    rm_steps: int
    dpo_steps: int
    grpo_steps: int
    batch: int
    prompts: int
    samples: int
    reply: int
    """tokens of a reply in reinforcement learning"""
    limit: int
    """rows of each task"""
    answer: int
    """tokens of an answer in evaluation"""
    texts: int
    """held-out texts scored beside transformers"""


FULL = Sizes(
    Amounts(demonstrations=400, chosen=64, pairs=64, heldout_demonstrations=40, heldout_pairs=32, heldout_prompts=96),
    sft_steps=58, rm_steps=8, dpo_steps=8, grpo_steps=20, batch=8, prompts=8, samples=8, reply=96, limit=100, answer=256,
    texts=20,
)  # fmt: skip
"""One passage over demonstrations and pairs; meant for an hour of two idle cores."""
SMALL = Sizes(
    Amounts(demonstrations=12, chosen=4, pairs=8, heldout_demonstrations=4, heldout_pairs=4, heldout_prompts=8),
    sft_steps=2, rm_steps=2, dpo_steps=2, grpo_steps=2, batch=4, prompts=2, samples=4, reply=24, limit=4, answer=24,
    texts=2,
)  # fmt: skip
"""The same whole, to see that it runs; its figures say nothing."""

_MODEL = """\
run_dir = "{run_dir}/{name}"
seed = {seed}

[model]
path = "{model}"
dtype = "fp32"

[data]
train = "{run_dir}/data/{rows}.jsonl"
"""
_TRAINED = (
    _MODEL
    + """\
max_length = 1024
pack_length = 1536

[heldout]
data = "{run_dir}/data/heldout_{rows}.jsonl"

[train]
steps = {steps}
global_batch = {batch}
log_every = 4

[optim]
lr = {lr}
schedule = "linear"
warmup = 0.1
"""
)
_GRPO = (
    _MODEL
    + """\
max_prompt = 256
pack_length = 1536

[heldout]
data = "{run_dir}/data/heldout_{rows}.jsonl"
every = {every}

[sampling]
samples = {samples}
max_tokens = {reply}

[policy]
loss = "grpo"
beta = 0.0

[rewards]
scale = 1.0
shuffle = {shuffle}

[train]
steps = {steps}
prompts = {prompts}
mini_batches = 1
refills = 0

[optim]
lr = 5e-6
schedule = "constant"
"""
)


def trained(stage: str, run_dir: str, model: str, seed: int, sizes: Sizes) -> str:
    """`sft`, `rm` or `dpo` (DPO-norm, the default)."""
    rows, steps, lr = {
        "sft": ("sft", sizes.sft_steps, "2e-5"),
        "rm": ("pairs", sizes.rm_steps, "2e-5"),
        "dpo": ("pairs", sizes.dpo_steps, "2e-6"),
    }[stage]
    return _TRAINED.format(run_dir=run_dir, name=stage, seed=seed, model=model, rows=rows, steps=steps, batch=sizes.batch, lr=lr)


def grpo(
    run_dir: str, model: str, seed: int, sizes: Sizes, name: str = "grpo", steps: int | None = None, control: bool = False
) -> str:
    """Constraints judged by the verifier `ifeval`; of a control the rewards are dealt out at random within each group."""
    steps = steps or sizes.grpo_steps
    return _GRPO.format(
        run_dir=run_dir, name=name, seed=seed, model=model, rows="prompts", steps=steps, every=max(1, steps // 4),
        samples=sizes.samples, reply=sizes.reply, prompts=sizes.prompts, shuffle=str(control).lower(),
    )  # fmt: skip
