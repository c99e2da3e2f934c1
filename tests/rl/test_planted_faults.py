"""Faults that others made in PPO, planted in a copy of the sources: each fails the test that is named beside it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LIMIT = 600
pytestmark = [pytest.mark.acceptance, pytest.mark.timeout(2 * LIMIT)]
ARITHMETIC = "tests/rl/test_actor_critic.py"
LAYOUT = "tests/rl/test_actor_critic_ranks.py::test_layout_equals_autograd"
APART = "tests/rl/test_actor_critic_ranks.py::test_a_layout_of_the_value_models_own_equals_autograd"
VALUE_UPDATE = "self._update(self._value, states, count, (begin + at) * value.updates + again, None)"
# file, what stands there, what is planted, the test that notices
FAULTS = {
    "the score one place early": (
        "objectives/gae.py", "rewards[-1] += score", "rewards[max(0, len(rewards) - 2)] += score", ARITHMETIC,
    ),
    "the last value's position missing": (
        "rl/states.py", "actions if number in cut_off else torch.cat([actions, end])", "actions", ARITHMETIC,
    ),
    "returns whitened": (
        "rl/states.py", "torch.from_numpy(estimates.returns)", "torch.from_numpy(whitening(estimates.returns))", ARITHMETIC,
    ),
    "a mean over packs": (
        "objectives/value.py", "return LossOutput(loss, counted,", "return LossOutput(loss / max(counted, 1), 1,", ARITHMETIC,
    ),
    "the divergence's sign": ("objectives/gae.py", "= -beta * (logp - ref_logp)", "= beta * (logp - ref_logp)", ARITHMETIC),
    "returns of clipped values": (
        "objectives/gae.py", "targets + values64", "targets + np.clip(values64, -0.2, 0.2)", ARITHMETIC,
    ),
    "returns of whitened advantages": (
        "rl/states.py", "torch.from_numpy(estimates.returns)",
        "torch.from_numpy(estimates.returns + (lambda a: whitening(a) - a)(np.resize(estimates.advantages, len(trace.states))))",
        ARITHMETIC,
    ),
    "whitened by the population's variance": ("objectives/gae.py", "every.var(ddof=1)", "every.var(ddof=0)", ARITHMETIC),
    "values read on the token itself": (
        "rl/states.py", "return found\n\n\ndef values_of",
        "return [Trace(one.number, one.segment, one.actions, (one.states + 1).clamp(max=len(batch.tokens_T) - 1)) "
        "for one in found]"
        "\n\n\ndef values_of", ARITHMETIC,
    ),
    "whitening on each rank by itself": (
        "rl/actor_critic.py", "whiten = whitening([each.advantages for each, _ in ordered])",
        "whiten = whitening([each.advantages for each, _ in mine.values()])", f"{LAYOUT}[DP2-True]",
    ),
    "the sampler's log-probabilities as those before the updates": (
        "rl/actor_critic.py", "batches = self._scored(batches, old=True)",
        'batches = [[each.with_columns(old_logp_T=each.column("sampler_logp_T")) for each in part] '
        "for part in self._scored(batches, old=True)]", f"{LAYOUT}[TP2-True]",
    ),
    "the penalty added": (
        "objectives/advantages.py", "penalty if cut else reward for", "penalty + (reward or 0.0) if cut else reward for",
        "tests/objectives/test_advantages.py",
    ),
    "the value head drawn anew": (
        "train/session.py", "if self.engine.reward and not family.reward else ()", "if self.engine.reward else ()",
        f"{LAYOUT}[TP2-True]",
    ),
    "the value model's schedule not applied": (
        "rl/actor_critic.py", VALUE_UPDATE, "self._update(self._value, states, count, 0, None)", f"{LAYOUT}[TP2-True]",
    ),
    "another virtual stage has the head": (
        "model/build.py", "post_process=topology.last_stage and vp_stage in (None, topology.virtual - 1)",
        "post_process=topology.last_stage and (vp_stage in (None, topology.virtual - 1) if not reward else not vp_stage)",
        f"{LAYOUT}[PP2xVPP2-False]",
    ),
    "old values anew in each pass": (
        "rl/actor_critic.py", VALUE_UPDATE, VALUE_UPDATE.replace("states", 'scored(self._value.engine, states, "old_values_T")'),
        f"{LAYOUT}[TP2-True]",
    ),
    "the policy as its own reference": (
        "rl/learner.py", "scored(self._policy.reference, part", "scored(self._policy.engine, part", f"{LAYOUT}[TP2-True]",
    ),
    "the value model under the policy's groups": (
        "distributed/topology.py", "with args[0].topology.entered():", "if True:", f"{APART}[TP2-True-DP2]",
    ),
    "values by place, not by response": (
        "rl/states.py", "return {\n        trace.number: batch.column",
        "return {\n        at: batch.column", f"{APART}[TP2-True-DP2]",
    ),
    "temperature left out": (
        "rl/policy_run.py", "temperature, shares = settings.sampling.temperature,", "temperature, shares = 1.0,",
        "tests/end_to_end/test_ppo.py::test_both_models_learn",
    ),
}  # fmt: skip
MORE = {  # what a second place of a fault needs
    "values by place, not by response": (
        "rl/states.py", "for batch in batches for trace in traces(batch, cut_off)\n    }\n\n\ndef with_values",
        "for batch in batches for at, trace in enumerate(traces(batch, cut_off))\n    }\n\n\ndef with_values",
    ),
}  # fmt: skip


def outcome(directory: Path, test: str) -> subprocess.CompletedProcess[str]:
    """Runs a test of a copy of the sources."""
    words = [sys.executable, "-m", "pytest", test, "-x", "-q", "-p", "no:cacheprovider"]
    environment = os.environ | {"PYTHONPATH": str(directory), "OMP_NUM_THREADS": "1"}
    return subprocess.run(words, cwd=directory, env=environment, capture_output=True, text=True, timeout=LIMIT)


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("copy")
    for name in ("tulu_mega", "tests"):
        shutil.copytree(ROOT / name, directory / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", directory)
    return directory


@pytest.mark.parametrize("test", sorted({fault[3] for fault in FAULTS.values()}))
def test_without_a_fault_it_passes(copy, test):
    ended = outcome(copy, test)
    assert ended.returncode == 0, ended.stdout[-3000:]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_noticed(copy, fault):
    *places, test = [FAULTS[fault][:3], *([MORE[fault]] if fault in MORE else []), FAULTS[fault][3]]
    before = {}
    try:
        for file, there, planted in places:
            source = (copy / "tulu_mega" / file).read_text()
            before.setdefault(file, source)
            assert source.count(there) == 1, f"{file}: the place where the fault is planted has changed"
            (copy / "tulu_mega" / file).write_text(source.replace(there, planted))
        ended = outcome(copy, test)
    finally:
        for file, source in before.items():
            (copy / "tulu_mega" / file).write_text(source)
    assert ended.returncode == 1 and "failed" in ended.stdout, ended.stdout[-3000:] + ended.stderr[-2000:]
    assert "Timeout" not in ended.stdout, f"too slow to say whether it is noticed: {ended.stdout[-3000:]}"
