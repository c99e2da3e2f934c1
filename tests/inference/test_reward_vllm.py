"""Reward models as they are written, in a real vLLM's pooling runner: its scores are transformers' and the engine's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.lib import families, reward_models, world
from tests.lib.layouts import LAYOUTS
from tulu_mega.quickstart import tiny_model

pytestmark = pytest.mark.servers

POOL = """
import json, sys
from tulu_mega.process import leave, uncollected

with uncollected():
    from vllm import LLM, PoolingParams
    from vllm.inputs import TokensPrompt

source, *models = sys.argv[1:]
prompts = [TokensPrompt(prompt_token_ids=ids) for ids in json.load(open(source))]
for model in models:
    llm = LLM(model, runner="pooling", enforce_eager=True, dtype="float32", disable_log_stats=True)
    answers = llm.encode(prompts, pooling_params=PoolingParams(use_activation=False), pooling_task="classify", use_tqdm=False)
    json.dump([answer.outputs.data.tolist() for answer in answers], open(model + ".scores.json", "w"))
    del llm
leave(0)
"""
ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
SERVED = ["Llama tied", "OLMo 2"]
OTHERS = ["Llama", *(each for each in families.FAMILIES if each not in (*SERVED, "Qwen 2 with windows"))]  # which vLLM refuses


def check(tmp_path, served):
    """Of several families, one vLLM after another in one process, whose start takes longer than all else."""
    pytest.importorskip("vllm")
    ranks = {}
    for family in served:
        language, model = str(tmp_path / f"language {family}"), str(tmp_path / family)
        world.run(1, families.make_language_model, language, family, 32)  # vLLM's attention has no smaller heads
        tiny_model.make_tokenizer().save_pretrained(language)  # vLLM wants one for a model of one label
        ranks[model] = world.run(2, reward_models.drawn, language, LAYOUTS["TP2"], 4, model)
        assert world.run(1, reward_models.unloaded, model) == [[]]
    texts = [each.input_ids[: reward_models.last(each) + 1] for each in reward_models.pairs(509)]
    source = tmp_path / "texts.json"
    source.write_text(json.dumps(texts))
    command = [sys.executable, "-c", POOL, str(source), *ranks]
    done = subprocess.run(command, env=os.environ | ENVIRONMENT, capture_output=True, text=True, timeout=290)
    assert done.returncode == 0, done.stderr[-4000:]
    for model, found in ranks.items():
        vllm = json.loads(Path(model + ".scores.json").read_text())
        assert all(len(score) == 1 for score in vllm)
        theirs = world.run(1, reward_models.scores, model)[0]
        ours = {row: score for scores, _ in found for row, score in scores.items()}
        assert len(set(theirs.values())) == len(texts)
        np.testing.assert_allclose([score for (score,) in vllm], list(theirs.values()), rtol=0, atol=2e-5, err_msg=model)
        np.testing.assert_allclose([score for (score,) in vllm], [ours[row] for row in theirs], rtol=0, atol=2e-5, err_msg=model)


def test_vllm_pools_the_scores_of_transformers(tmp_path):
    check(tmp_path, SERVED)


@pytest.mark.acceptance
@pytest.mark.timeout(600)
def test_every_family(tmp_path):
    check(tmp_path, OTHERS)
