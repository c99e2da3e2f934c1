"""What every rank of every distributed test imports; the fork server loads it once and ranks are forks of it.

What is there then is not looked at by garbage collection again: else the first one in each rank goes over all of it and copies
its pages, half a second.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TRITON_INTERPRET"] = "1"  # decides when megatron-core imports triton; only our kernels' tests use it

import warnings

warnings.simplefilter("ignore")

from tulu_mega.process import uncollected  # noqa: E402

with uncollected():
    import torch

    torch.set_num_threads(1)

    import tulu_mega.platforms.cpu

    tulu_mega.platforms.cpu.install()

    import transformers.models.llama.modeling_llama  # noqa: F401

    import tulu_mega.platforms.adam
    import tulu_mega.recipes.score
    import tulu_mega.recipes.sft
    import tulu_mega.train.engine
