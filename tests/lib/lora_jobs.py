"""What PEFT and ranks do in the tests of low-rank adapters."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from tests.lib import families, jobs
from tests.lib.checkpoints import save
from tulu_mega.bridge.stream import LiveWeights
from tulu_mega.config import OptimSettings
from tulu_mega.config.lora import LoraSettings
from tulu_mega.objectives.reward import RewardObjective
from tulu_mega.objectives.sft import SftObjective
from tulu_mega.records import IGNORE
from tulu_mega.train import checkpoint
from tulu_mega.train.adapter_figures import adapter_figures
from tulu_mega.train.adapter_reference import AdapterReference

LR, ADAMW_LR, STEPS = 0.01, 1e-3, 3
TOKENS = 64
"""of `kept_narrow`"""


def see_oracles() -> None:
    """Makes what requirements/oracles.txt installs importable, in this process."""
    sys.path.append(str(Path(sys.prefix, "oracles")))


def peft_model(directory: str, how: dict[str, Any], adapter: str | None = None):
    """The model with PEFT's adapters beside it, float32; B and lengths drawn too, so that A has a gradient."""
    see_oracles()
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    if adapter:
        return PeftModel.from_pretrained(base, adapter, is_trainable=True)
    torch.manual_seed(7)
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", lora_dropout=0.0, init_lora_weights=False, **how))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "magnitude" in name:  # PEFT begins with the lengths of the rows, by which nothing is changed
                parameter *= 1 + 0.2 * torch.randn_like(parameter)
    return model


def peft_matches(names: list[str], targets: list[Any], patterns: list[dict[str, int]]) -> tuple[list, list]:
    """For each of the targets which modules PEFT gives adapters; for each of the patterns the ranks that it finds, else 11."""
    see_oracles()
    from peft import LoraConfig
    from peft.tuners.tuners_utils import check_target_module_exists
    from peft.utils.other import get_pattern_key

    of_all = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]  # as PEFT writes "all-linear" down
    configs = [LoraConfig(target_modules=of_all if each == "all-linear" else each) for each in targets]
    has = [[bool(check_target_module_exists(config, name)) for name in names] for config in configs]
    return has, [[each.get(get_pattern_key(each.keys(), name), 11) for name in names] for each in patterns]


def stepped(model: torch.nn.Module, trained: list[torch.Tensor], steps: torch.optim.Optimizer) -> dict[str, Any]:
    """Makes `STEPS` steps over the jobs' sequences, a sequence at a time; losses and gradient norms."""
    seen: dict[str, Any] = {"losses": [], "norms": []}
    for step in range(STEPS):
        model.zero_grad()
        total, tokens = torch.zeros((), dtype=torch.float64), 0
        for sequence in jobs.sequences(model.config.vocab_size, seed=3 + step):
            ids, labels = torch.tensor(sequence.input_ids), torch.tensor(sequence.labels)
            logits = model(ids[None]).logits[0, :-1]
            mask = labels[1:] != IGNORE
            total = total + F.cross_entropy(logits[mask], ids[1:][mask], reduction="sum").double()
            tokens += int(mask.sum())
        (total / tokens).backward()
        seen["losses"].append(float(total) / tokens)
        seen["norms"].append(float(torch.sqrt(sum(each.grad.double().pow(2).sum() for each in trained))))
        steps.step()
    return seen


def peft_truth(kind: str, root: str, how: dict[str, Any], optimizer: str = "sgd") -> dict[str, Any]:
    """Makes a model and adapters in ROOT/model and ROOT/adapter, trains these, and leaves ROOT/trained and ROOT/merged.

    Returns:
        losses and norms of the steps.
    """
    families.make_language_model(f"{root}/model", kind)
    model = peft_model(f"{root}/model", how)
    model.save_pretrained(f"{root}/adapter")
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if optimizer == "sgd":
        steps = torch.optim.SGD(trained, lr=LR)
    else:
        steps = torch.optim.AdamW(trained, lr=ADAMW_LR, weight_decay=0.1)
    seen = stepped(model, trained, steps)
    model.save_pretrained(f"{root}/trained")
    model.merge_and_unload().save_pretrained(f"{root}/merged")
    return seen


def trained(
    directory: str,
    layout: dict[str, Any],
    lora: dict[str, Any],
    out: str | None,
    optimizer: str = "sgd",
    steps: int = STEPS,
    recompute: str = "none",
    folder: str | None = None,
    first: int = 0,
    dtype: str = "fp32",
) -> dict[str, Any]:
    """The same by the engine under a layout, in OUT/adapter and OUT/hf; goes on from a checkpoint in the folder, leaves one."""
    settings = LoraSettings.model_validate(lora)
    with jobs.session(directory, layout, dtype, recompute, lora=settings) as made:
        engine = made.engine
        frozen = {name: value.clone() for name, value in _base(engine).items()}
        optim = dict(name=optimizer, lr=LR if optimizer == "sgd" else ADAMW_LR, schedule="constant", warmup=0.0, clip=0.0)
        engine.prepare_training(OptimSettings(**optim, weight_decay=0.1 if optimizer == "adamw" else 0.0), STEPS)
        if first:
            checkpoint.restore({"model": engine}, checkpoint.find(Path(folder))[-1])
        seen: dict[str, Any] = {"losses": [], "norms": []}
        for step in range(first, steps):
            micro = jobs.share(made, jobs.sequences(engine.hf.vocab_size, seed=3 + step), 2)
            loss = engine.forward_backward(micro, SftObjective("token_mean"))
            seen["losses"].append(loss.loss)
            seen["norms"].append(engine.optimizer_step(step, loss.loss).grad_norm)
        seen |= adapter_figures(engine)
        engine.settle()
        assert all(torch.equal(value, frozen[name]) for name, value in _base(engine).items())
        if folder:
            save(engine, Path(folder), steps, {}, keep=9)
        if out:
            made.export_adapters(Path(out, "adapter"), torch.float32 if dtype == "fp32" else torch.bfloat16)
            made.export(Path(out, "hf"), torch.float32 if dtype == "fp32" else torch.bfloat16, {})
        return seen


def _base(engine) -> dict[str, torch.Tensor]:
    """What is frozen; it has neither gradients nor a place in the optimizer."""
    named = {f"{at}.{name}": each for at, chunk in enumerate(engine.chunks) for name, each in chunk.named_parameters()}
    frozen = {name: each for name, each in named.items() if ".adapters." not in name}
    assert not any(each.requires_grad or hasattr(each, "main_grad") for each in frozen.values())
    return {name: each.data for name, each in frozen.items()}


def trained_reward(directory: str, layout: dict[str, Any], out: str) -> list[float] | None:
    """A reward model of a language model, its head drawn, one step of its adapters and head; the scores of last tokens."""
    with jobs.session(directory, layout, reward=True, lora=LoraSettings(rank=3)) as made:
        engine = made.engine
        optim = OptimSettings(name="sgd", lr=0.1, schedule="constant", warmup=0.0, clip=0.0, weight_decay=0.0)
        engine.prepare_training(optim, 2)
        sequences = jobs.sequences(engine.hf.vocab_size)
        for step in range(2):  # B is 0 before the first
            loss = engine.forward_backward(jobs.share(made, sequences, 2, together=2), RewardObjective())
            engine.optimizer_step(step, loss.loss)
        made.export_adapters(Path(out, "adapter"), torch.float32)
        (micro,) = jobs.share(made, sequences, 1, together=2)
        scores = engine.score([micro])
        if not scores:
            return None
        ends = {row: int(at) for row, at in zip(micro.rows_S.tolist(), micro.ends_T.nonzero().squeeze(1), strict=False)}
        return [float(scores[0][ends[row]]) for row in range(len(sequences))]


def peft_scores(directory: str, adapter: str) -> list[float]:
    """The same scores by PEFT and transformers, of the language model's directory and the adapters'."""
    see_oracles()
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    base = AutoModelForSequenceClassification.from_pretrained(directory, num_labels=1, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, adapter).eval()
    hidden = model.base_model.model
    scores = []
    with torch.no_grad():
        for sequence in jobs.sequences(base.config.vocab_size):
            states = hidden.model(torch.tensor([sequence.input_ids])).last_hidden_state
            scores.append(float(hidden.score(states)[0, -1, 0]))
    return scores


def kept_narrow(directory: str, layout: dict[str, Any], lora: LoraSettings) -> dict[str, int]:
    """Bytes of tensors as narrow as the rank that autograd keeps in a forward pass over `TOKENS` tokens, without parameters."""
    found: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.dim() > 1 and tensor.shape[-1] == lora.rank and tensor.untyped_storage().data_ptr() not in own:
            found[tensor.data_ptr()] = tensor.nbytes
        return tensor

    with jobs.session(directory, layout, lora=lora) as made:
        engine = made.engine
        engine.prepare_training(OptimSettings(), 1)
        own = {each.untyped_storage().data_ptr() for chunk in engine.chunks for each in chunk.parameters()}
        micro = jobs.share(made, jobs.sequences(engine.hf.vocab_size, [TOKENS]), 1)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            engine.forward_backward(micro, SftObjective("token_mean"))
    return {"narrow": sum(found.values())}


def policy_parts(directory: str, layout: dict[str, Any], adapter: str, out: str) -> bool:
    """What a policy with adapters needs: its reference, and weights for servers, each stage's in OUT; the model goes to OUT/hf.

    Returns:
        whether the reference is, after two steps, what the model was before them, and left the trained model as it was.
    """
    with jobs.session(directory, layout, lora=LoraSettings(adapter=adapter)) as made:
        engine = made.engine
        micro = jobs.share(made, jobs.sequences(engine.hf.vocab_size), 2)
        before, reference = engine.score(micro), AdapterReference(engine)
        optim = OptimSettings(name="sgd", lr=0.1, schedule="constant", warmup=0.0, clip=0.0, weight_decay=0.0)
        engine.prepare_training(optim, 2)
        for step in range(2):
            engine.optimizer_step(step, engine.forward_backward(micro, SftObjective("token_mean")).loss)
        trained, then = engine.score(micro), reference.score(micro)
        again = engine.score(micro)
        same = all(map(torch.equal, before, then)) and all(map(torch.equal, trained, again))
        differ = not any(map(torch.equal, before, trained))
        made.export(Path(out, "hf"), torch.float32, {})
        if made.topology.first_copy:
            stream = LiveWeights(made.shard(engine.hf.to_dict()), torch.float32)
            held = {name: whole for name, whole in stream if whole is not None}
            if held:
                save_file(held, f"{out}/stage{made.topology.pipeline_rank}.safetensors")
        return same and (differ or not before)
