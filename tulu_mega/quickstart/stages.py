"""What the quickstart's stages train with, as TOML for the real commands.

`examples/{sft,rm,dpo_norm,grpo}_tiny.toml` are these for the default directory, seed and steps.
"""

from __future__ import annotations

_SFT = """\
# Supervised fine-tuning of the quickstart's model: 2 processes, tensor and sequence parallel, on two CPU cores.
# `tulu-mega quickstart` makes the data and the model, and runs this.

run_dir = "{run_dir}/sft"
seed = {seed}

[model]
path = "{run_dir}/model"
dtype = "fp32"

[parallel]
tensor = 2
sequence = true

[data]
train = "{run_dir}/data/train.jsonl"
template = "tulu"
max_length = 512
pack_length = 4096                 # the whole batch in one packed micro-batch

# [heldout]                        # rows that are not trained on: their mean loss every so many steps and at the end
# data = "rows.jsonl"              # of messages, as data.train's; the quickstart asks the model itself instead
# every = 100

[train]
steps = {steps}
global_batch = 64
reduction = "sum"                  # Tulu 3: the sum over tokens, divided by the number of sequences
log_every = 20

[optim]
lr = 3e-3                          # 600 times what 8B parameters take: a million bear it
schedule = "linear"
warmup = 0.03
betas = [0.9, 0.999]
weight_decay = 0.0
clip = 1.0
"""

_PAIRS = """\
[model]
path = "{run_dir}/sft/hf"
dtype = "fp32"

[parallel]
data = 2

[data]
train = "{run_dir}/data/{pairs}.jsonl"
template = "tulu"
max_length = 512
pack_length = 4096                 # 32 pairs of some 100 tokens

[heldout]
data = "{run_dir}/data/heldout_{pairs}.jsonl"
every = 30
"""

_RM = (
    """\
# A reward model from the quickstart's SFT model: 2 processes, data parallel, on two CPU cores.
# `tulu-mega quickstart` makes the pairs and the model, and runs this.

run_dir = "{run_dir}/rm"
seed = {seed}

"""
    + _PAIRS
    + """
[train]
steps = {rm_steps}
global_batch = 64                  # pairs
log_every = 20

[optim]
lr = 1e-3
schedule = "linear"
warmup = 0.03
clip = 1.0
"""
)

_DPO = (
    """\
# Length-normalised DPO of the quickstart's SFT model: 2 processes, data parallel, on two CPU cores.
# `tulu-mega quickstart` makes the pairs and the model, and runs this.

run_dir = "{run_dir}/dpo"
seed = {seed}

"""
    + _PAIRS
    + """
[preference]
loss = "dpo_norm"
beta = 5.0

[train]
steps = {dpo_steps}
global_batch = 64                  # pairs
log_every = 20

[optim]
lr = 2e-4                          # 400 times what 8B parameters take
schedule = "linear"
warmup = 0.1
clip = 1.0
"""
)

_GRPO = """\
# Reinforcement learning of the quickstart's DPO model: 2 processes, data parallel, and a vLLM server, on two CPU cores.
# `tulu-mega quickstart` makes the prompts and the model, and runs this.

run_dir = "{run_dir}/grpo"
seed = {seed}

[model]
path = "{run_dir}/dpo/hf"
dtype = "fp32"

[parallel]
data = 2

[data]
train = "{run_dir}/data/prompts.jsonl"
template = "tulu"
max_prompt = 128
pack_length = 4096

[heldout]
data = "{run_dir}/data/heldout.jsonl"
every = 20

[sampling]
samples = 16
max_tokens = 48
temperature = 1.0

[rollout]
gpu_memory = 0.3                   # where a server shares a GPU with the ranks

[policy]
loss = "grpo"
advantages = "standardised"
beta = 0.0                         # no reference: the task has one right answer, there is nothing to drift from
overlong = "keep"

[rewards]
scale = 1.0

[train]
steps = {grpo_steps}
prompts = 32
mini_batches = 1
log_every = 5

[optim]
lr = 2e-5
schedule = "constant"
warmup = 0.0
clip = 1.0
"""

TEMPLATES = {"sft": _SFT, "rm": _RM, "dpo": _DPO, "grpo": _GRPO}
"""By command, in the order they are run."""


def stage_settings(command: str, run_dir: str, **values: int) -> str:
    """A stage's settings in a quickstart's directory, as TOML.

    Args:
        values: seed and steps, by the names of :class:`tulu_mega.quickstart.settings.QuickstartSettings`.
    """
    pairs = "rm_pairs" if command == "rm" else "pairs"
    return TEMPLATES[command].format(run_dir=run_dir, pairs=pairs, **values)
