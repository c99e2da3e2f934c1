"""What ranks of these tests import in the place of `tests.lib.warm`: models are built of Transformer Engine's layers."""

import dataclasses
import os

os.environ["TRITON_INTERPRET"] = "1"  # as there; Transformer Engine imports triton too
os.environ["NVTE_FP8_BLOCK_SCALING_FP32_SCALES"] = "1"  # as PrecisionSettings.environment has it before ranks start

from tests.standins.transformer_engine import package

package.install()

import tests.lib.warm  # noqa: E402, F401
from tulu_mega.model import build  # noqa: E402

package.pretend()

_situation = build.situation
build.use_transformer_engine = lambda spec, platform: spec != "local"
build.situation = lambda *args: dataclasses.replace(_situation(*args), device="cuda", capability=(9, 0))
