"""What every rank of every distributed test imports; the fork server loads it once and ranks are forks of it."""

import atexit
import gc
import os

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TRITON_INTERPRET"] = "1"  # decides when megatron-core imports triton; only our kernels' tests use it

import warnings

warnings.simplefilter("ignore")
gc.disable()

import torch  # noqa: E402

torch.set_num_threads(1)

import tulu_mega.platforms.cpu  # noqa: E402

tulu_mega.platforms.cpu.install()

import transformers.models.llama.modeling_llama  # noqa: E402, F401

import tulu_mega.engine  # noqa: E402
import tulu_mega.platforms.adam  # noqa: E402
import tulu_mega.recipes.score  # noqa: E402
import tulu_mega.recipes.sft  # noqa: E402

gc.enable()
atexit.register(gc.unfreeze)  # libraries complain of what is left at the end
gc.freeze()  # else the first full collection in each rank looks at all that was imported, and copies its pages: half a second
