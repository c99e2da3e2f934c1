"""Training steps on a CUDA device that is not there, as `test_steps.py` asks for them: a case a line in, an answer a line out.

    python -m tests.standins.cuda_device.steps GUARD [te]
"""

from __future__ import annotations

import contextlib
import json
import sys
import traceback
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tests.standins.cuda_device import device
from tests.standins.transformer_engine import package


def main(guard: str, layers: str = "") -> None:
    """
    Args:
        guard: of `device.build`.
        layers: ``te`` for Transformer Engine's, whose kernels give tensors of the right shapes.
    """
    device.load(guard)
    if layers:
        package.install()
    from transformers import LlamaForCausalLM  # noqa: F401  its module wants torch.cuda as it is

    from tulu_mega.platforms import adam, grad_norm, prepare_imports, weight_gradient

    prepare_imports()
    mode = device.install()
    if layers:
        package.without_values()
    adam.install()
    grad_norm.install()
    weight_gradient.install()
    for line in sys.stdin:
        case = json.loads(line)
        try:
            what = next((each for each in (mixed, reads, fitted) if case.pop(each.__name__, False)), step)
            answer = what(mode, **case)
        except Exception as error:
            answer = {"failed": f"{error!r}\n{traceback.format_exc()}"}
        print(json.dumps(answer), flush=True)


def step(
    mode,
    model: str,
    layout: dict[str, Any],
    rank: int,
    world: int,
    objective: str = "sft",
    dtype: str = "bf16",
    recompute: str = "none",
    kernels: str = "auto",
    megatron: dict[str, Any] | None = None,
    precision: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Scores two micro-batches, and trains on them.

    Returns:
        ``scoring``, ``waits``: by file and function, how often values of the device were asked for by scoring and by the training
        step; ``attention``: what attention of ours the layers have; ``layers``: what they have of megatron-core's modules by
        Transformer Engine.
    """
    from tulu_mega.config import EngineSettings

    settings = EngineSettings.model_validate(
        {
            "model": {"path": model, "dtype": dtype, "recompute": recompute, "kernels": kernels},
            "parallel": layout,
            "megatron": megatron or {},
            "precision": precision or {},
        }
    )
    with _engine(mode, settings, rank, world, objective) as (engine, batch, minimised):
        mode.waits.clear()
        engine.score([batch] * 2)
        scoring = dict(mode.waits)
        mode.waits.clear()
        loss = engine.forward_backward([batch] * 2, minimised)
        engine.optimizer_step(0, loss)
        loss.read()
        modules = [module for chunk in engine.chunks for module in chunk.modules()]
        return {
            "scoring": scoring,
            "waits": dict(mode.waits),
            "attention": sorted({m.kernel for m in modules if hasattr(m, "kernel")}),
            "layers": sorted({type(m).__name__ for m in modules if type(m).__name__.startswith("TE")}),
        }


def fitted(mode, model: str, layout: dict[str, Any], rank: int, world: int, steps: int) -> dict[str, Any]:
    """A run of the training loop on a fixed data set, slow ranks looked for at every step, nothing evaluated or saved on the way.

    Returns:
        ``waits``: of every step, by file and function, how often the host waited; what comes after the last step is its.
    """
    from tulu_mega.config import EngineSettings, TrainSettings
    from tulu_mega.resilience.guards import Guards
    from tulu_mega.train.loop import Fit
    from tulu_mega.train.profiling import StepProfiler
    from tulu_mega.train.save_schedule import SaveSchedule

    settings = EngineSettings.model_validate({"model": {"path": model, "dtype": "bf16"}, "parallel": layout})
    with _engine(mode, settings, rank, world, "sft") as (engine, batch, minimised):
        device, waits = engine.platform.device, []

        def batches(_step: int) -> SimpleNamespace:
            waits.append(dict(mode.waits))
            mode.waits.clear()
            return SimpleNamespace(micro_batches=[batch] * 2)

        watched = SimpleNamespace(step=lambda _number: None)
        train = TrainSettings.model_validate({"straggler": {"every": 1}})
        guards = Guards(train, watched, device, engine.topology.pipeline_rank, False, Path("unwritten"))
        saver = SimpleNamespace(writing=False, poll=lambda writing: None, save=lambda *_: None, finish=lambda: None)
        fit = Fit(
            engine=engine,
            loader=SimpleNamespace(steps=steps, batches=batches),
            objective=minimised,
            guards=guards,
            saves=SaveSchedule(saver, None, steps, guards.stop_requested),
            where=str,
            flops=lambda _data: 0.0,
            log=None,
            profiler=StepProfiler(None, rank, device, Path()),
        )
        mode.waits.clear()
        mode.value = 0  # nobody asks the run to end
        try:
            fit.run(0)
        finally:
            mode.value = 1
        return {"waits": [*waits[1:], dict(mode.waits)]}


@contextlib.contextmanager
def _engine(mode, settings, rank: int, world: int, objective: str):
    """An engine under the mode, a pack of this rank's, and what is minimised."""
    import torch
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from tulu_mega.bridge.families import family_for
    from tulu_mega.bridge.families.reward import reward_fields
    from tulu_mega.config import OptimSettings
    from tulu_mega.distributed import topology
    from tulu_mega.model.hf_config import load_config
    from tulu_mega.platforms import Platform
    from tulu_mega.train.engine import Engine

    hf, platform = load_config(settings.model), Platform(torch.device("cuda", 0), "fake")
    if reward := objective == "reward":
        hf.update(reward_fields(family_for(hf.to_dict()), hf.to_dict()))
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    try:
        here = topology.start(settings.parallel, platform, seed=0)
        with mode:
            engine = Engine(hf, settings, here, platform, reward=reward, shares=objective == "shared")
            engine.prepare_training(OptimSettings(), 2)
            made = SimpleNamespace(topology=here, engine=engine, settings=settings)
            yield engine, *_batch(objective, engine, made)
    finally:
        topology.stop()


def mixed(mode) -> None:
    """A mistake."""
    import torch

    with mode:
        torch.ones(3, device="cuda") + torch.ones(3)


def reads(mode) -> dict[str, Any]:
    """What a device's user waits for."""
    import torch

    mode.waits.clear()
    with mode:
        values = torch.ones(3, device="cuda", dtype=torch.int64)
        values[0].item()
        values.cpu()
        (values.to(torch.float32) + 2.0).sum()
    return {"waits": dict(mode.waits)}


def _batch(objective: str, engine, made):
    """A pack of this rank's, and what is minimised."""
    import torch

    from tests.lib import jobs, policy_jobs
    from tulu_mega.data.loader import by_segment
    from tulu_mega.layout.packing_rules import pack_alignment, pipeline_of
    from tulu_mega.objectives.preference import dpo_norm
    from tulu_mega.objectives.preference_objective import PreferenceObjective
    from tulu_mega.objectives.reward import RewardObjective
    from tulu_mega.objectives.sft import SftObjective

    made.align, made.pipeline = pack_alignment(made.settings), pipeline_of(engine.hf.to_dict(), made.settings)
    vocab = engine.hf.vocab_size
    if objective == "sft":
        return jobs.share(made, jobs.sequences(vocab) * made.topology.data, None)[0], SftObjective("token_mean")
    if objective in ("dpo", "reward"):
        [*_, batch] = jobs.share(made, jobs.sequences(vocab) * made.topology.data, None, together=2)
        if objective == "reward":
            return batch, RewardObjective()
        rows = torch.zeros(8 * made.topology.data).double().numpy()
        batch = batch.with_columns(ref_logp_S=by_segment(batch, rows))
        return batch, PreferenceObjective(dpo_norm.Loss())
    sequences = policy_jobs.sequences(vocab)
    if objective == "shared":
        batch = jobs.share_prefixes(made, sequences)[0]
    else:
        batch = jobs.share(made, sequences * made.topology.data, None, capacity=policy_jobs.PACK)[0]
    zeros = torch.zeros(len(batch.tokens_T))
    columns = ("sampler_logp_T", "old_logp_T", "ref_logp_T", "advantages_T")
    settings = {"loss": "grpo", "clip_low": 0.2, "clip_high": 0.2, "aggregation": "token", "beta": 0.1, "importance": "token"}
    return batch.with_columns(**dict.fromkeys(columns, zeros)), policy_jobs._objective(settings)


if __name__ == "__main__":
    main(*sys.argv[1:])
