"""What ranks do in the tests of a policy beside a value model, and what transformers and autograd make of the same."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.lib import jobs, response_jobs
from tests.lib.oracles import ppo as oracle
from tulu_mega.config import OptimSettings, PpoSettings
from tulu_mega.config.ppo import PpoTrainSettings
from tulu_mega.data.batch import pack
from tulu_mega.distributed.collectives import from_lead
from tulu_mega.layout.packing_rules import pack_alignment
from tulu_mega.objectives.policy import PolicyObjective
from tulu_mega.objectives.value import ValueObjective
from tulu_mega.records import IGNORE, TokenizedRow
from tulu_mega.resilience.guards import Guards
from tulu_mega.rl.actor_critic import ActorCritic
from tulu_mega.rl.batches import TrainedResponse, packed, split
from tulu_mega.rl.collector import Collected
from tulu_mega.rl.learner import Trained
from tulu_mega.rl.reward_model import RewardModelScores
from tulu_mega.train.engine import Engine
from tulu_mega.train.step_clock import StepClock

BETA, LAM, CLIP, RANGE, COEFFICIENT = 0.2, 0.9, 0.2, 0.1, 0.5
ALPHA = 0.3
"""of a lambda by length: all responses but the shortest have one above 0"""


@dataclasses.dataclass(frozen=True)
class Updates:
    """A step's updates of both models."""

    name: str
    optimizer: str
    mini_batches: int
    passes: int
    lr: dict[str, float]
    """of each model, at first; goes down to 0 in a line"""
    decay: float = 0.0
    value_updates: int = 1
    warmup: bool = False
    """the value model alone learns"""
    settings: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    """of the run, by section"""

    def count(self, model: str) -> int:
        """Of a model, in a step."""
        return self.mini_batches * self.passes * (self.value_updates if model == "value" else 1)

    def theirs(self, model: torch.nn.Module, name: str) -> tuple[torch.optim.Optimizer, Any]:
        """torch's own optimizer and schedule."""
        every = list(model.parameters())
        groups = [
            {"params": [each for each in every if each.ndim > 1], "weight_decay": self.decay},
            {"params": [each for each in every if each.ndim == 1], "weight_decay": 0.0},  # megatron-core leaves norms alone
        ]
        optimizer = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[self.optimizer](groups, lr=self.lr[name])
        return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda at: 1 - at / self.count(name))

    def ours(self, name: str) -> OptimSettings:
        given = {"name": self.optimizer, "lr": self.lr[name], "weight_decay": self.decay}
        return OptimSettings.model_validate(given | {"schedule": "linear", "warmup": 0.0, "clip": 0.0})


SGD = Updates("sgd", "sgd", 2, 2, {"policy": 0.05, "value": 0.02})
FIVE = Updates("five", "sgd", 1, 5, {"policy": 0.05, "value": 0.02})
ADAMW = Updates("adamw", "adamw", 1, 1, {"policy": 1e-4, "value": 1e-4}, decay=0.1)
GRADIENT = Updates("gradient", "sgd", 1, 1, {"policy": 1e4, "value": 1e4})  # beside which the weights before are nothing
VAPO = Updates(
    "vapo", "sgd", 2, 1, SGD.lr, value_updates=3,
    settings={"gae": {"value_lam": 1.0, "adaptive": ALPHA}, "value": {"clip": 0.0}, "policy": {"aggregation": "token"}},
)  # fmt: skip
WARMUP = Updates("warm-up", "sgd", 2, 1, SGD.lr, warmup=True)
EVERY = {each.name: each for each in (SGD, FIVE, ADAMW, GRADIENT, VAPO, WARMUP)}


def make_models(directory: str) -> None:
    """A policy, a reference that is another model, and a value model, by transformers."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    policy = f"{directory}/model"
    jobs.make_model(policy, False)
    torch.manual_seed(11)
    reference = AutoModelForCausalLM.from_pretrained(policy)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    reference.save_pretrained(f"{directory}/reference")
    value = AutoModelForSequenceClassification.from_pretrained(policy, num_labels=1, dtype=torch.float32)
    torch.nn.init.normal_(value.score.weight, std=0.1)
    value.save_pretrained(f"{directory}/value")


def responses(vocab: int) -> list[list[TrainedResponse]]:
    """Of one to four answers, by prompt; of some the room ran out."""
    every = [
        dataclasses.replace(
            one,
            response=dataclasses.replace(one.response, finish_reason="length" if one.number in (1, 4) else "stop"),
            advantage=10.0 * (one.number % 2) - 2.0,
        )
        for one in response_jobs.responses(vocab)
    ]
    ends = [sum(response_jobs.SAMPLES[: at + 1]) for at in range(len(response_jobs.SAMPLES))]
    return [every[end - samples : end] for end, samples in zip(ends, response_jobs.SAMPLES, strict=True)]


def hugging_faces(directory: str) -> dict[str, dict[str, Any]]:
    """Of each kind of updates, by its name."""
    return {name: hugging_face(directory, updates) for name, updates in EVERY.items()}


def hugging_face(directory: str, updates: Updates) -> dict[str, Any]:
    """The losses, gradient norms and values of every update; saves both models as they are at the end."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    policy = AutoModelForCausalLM.from_pretrained(f"{directory}/model", dtype=torch.float32)
    reference = AutoModelForCausalLM.from_pretrained(f"{directory}/reference", dtype=torch.float32)
    value = AutoModelForSequenceClassification.from_pretrained(f"{directory}/value", dtype=torch.float32)
    groups = responses(policy.config.vocab_size)
    every = [one for group in groups for one in group]
    room = max(one.response.num_trained for one in every) + 1
    lengths = torch.tensor([one.response.num_trained for one in every])
    cut_off = torch.tensor([one.response.finish_reason == "length" for one in every])
    masks = oracle.Masks(lengths, cut_off, room)

    def actions(one: TrainedResponse) -> Tensor:
        return (torch.tensor(one.response.labels) != IGNORE).nonzero().squeeze(1)

    def logp(model, numbers: list[int]) -> Tensor:
        rows = []
        for number in numbers:
            ids, at = torch.tensor(every[number].response.token_ids), actions(every[number])
            told = model(ids[None]).logits[0].double().log_softmax(-1)
            rows.append(told[at - 1, ids[at]])
        return torch.nn.utils.rnn.pad_sequence([torch.nn.functional.pad(row, (0, room - len(row))) for row in rows], True)

    def values(numbers: list[int]) -> Tensor:
        rows = []
        for number in numbers:
            ids, at = torch.tensor(every[number].response.token_ids), actions(every[number])
            hidden = value.model(ids[None]).last_hidden_state[0]
            told = (hidden @ value.score.weight[0]).double()
            states = torch.cat([at - 1, at[-1:]])[: room if len(at) < room else len(at)]
            rows.append(torch.nn.functional.pad(told[states], (0, room - len(states))))
        return torch.stack(rows)

    numbers = [one.number for one in every]
    with torch.no_grad():
        old_logp, ref_logp, old_values = logp(policy, numbers), logp(reference, numbers), values(numbers)
        score = torch.tensor([one.advantage for one in every], dtype=torch.float64)
        of_vapo = updates is VAPO
        lams = (1 - 1 / (ALPHA * lengths.double())).clamp(min=0.0), 1.0
        given = masks, score, old_logp, ref_logp, old_values, BETA
        white, returns = oracle.advantages_and_returns(*given, lams[0] if of_vapo else LAM)
        if of_vapo:
            _, returns = oracle.advantages_and_returns(*given, lams[1])
    mean, clip = (oracle.mean, 0.0) if of_vapo else (oracle.mean_of_means, RANGE)
    parts = [[one.number for one in part] for part in split(groups, updates.mini_batches)]
    told: dict[str, Any] = {"value": [], "policy": []}
    told["explained_variance"] = float(
        1 - (returns - old_values)[masks.of_value].var(unbiased=False) / returns[masks.of_value].var(unbiased=False)
    )
    steps = {"value": updates.theirs(value, "value"), "policy": updates.theirs(policy, "policy")}
    for part in parts * updates.passes:
        chosen = oracle.Masks(lengths[part], cut_off[part], room)
        for name, model in [("value", value)] * updates.value_updates + [("policy", policy)] * (not updates.warmup):
            model.zero_grad()
            if name == "value":
                loss = oracle.value_loss(chosen, values(part), old_values[part], returns[part], clip, COEFFICIENT, mean)
            else:
                loss = oracle.policy_loss(chosen, logp(policy, part), old_logp[part], white[part], CLIP, mean)
            loss.backward()
            norm = torch.sqrt(sum(p.grad.double().pow(2).sum() for p in model.parameters() if p.grad is not None))
            for each in steps[name]:
                each.step()
            told[name].append((float(loss.detach()), float(norm)))
    policy.save_pretrained(f"{directory}/{updates.name}_policy")
    value.save_pretrained(f"{directory}/{updates.name}_value")
    return told


def engine(
    directory: str, layout: dict[str, Any], out: str, share: bool, value_layout: dict[str, Any] | None, name: str
) -> dict[str, Any]:
    """The same by the learner on packs.

    Args:
        value_layout: the value model's, where it has its own.
        name: of the kind of updates.
    """
    kind = EVERY[name]
    train = {"mini_batches": kind.mini_batches, "passes": kind.passes, "share_prompts": share}
    settings = PpoSettings.model_validate(
        {
            "model": {"path": f"{directory}/model", "dtype": "fp32"}, "parallel": layout, "run_dir": f"{out}/run",
            "data": {"train": "none", "pack_length": response_jobs.CAPACITY}, "sampling": {"max_tokens": 1000},
            "value": {
                "path": f"{directory}/value", "clip": RANGE, "coefficient": COEFFICIENT, "parallel": value_layout,
                "updates": kind.value_updates, "warmup": int(kind.warmup), **kind.settings.get("value", {}),
            },
            "gae": {"lam": LAM, **kind.settings.get("gae", {})}, "train": train,
            "policy": {"beta": BETA, "importance": "none", **kind.settings.get("policy", {})},
        }
    )  # fmt: skip
    with jobs.session(f"{directory}/model", layout) as made:
        value = made.beside(f"{directory}/value", reward=True, parallel=settings.value.parallel)
        reference = made.beside(f"{directory}/reference", reward=False).engine
        made.engine.prepare_training(kind.ours("policy"), kind.count("policy"))
        value.engine.prepare_training(kind.ours("value"), kind.count("value"))
        place, device = made.topology, made.engine.platform.device
        guards = Guards(PpoTrainSettings(), made.watch, device, place.pipeline_rank, made.lead, Path(out, "skipped.jsonl"))
        policy = Trained(
            made.engine, PolicyObjective.without_divergence(settings.policy, settings.sampling.max_tokens), reference
        )
        critic = Trained(value.engine, ValueObjective(settings.value.coefficient, settings.value.clip))
        learner = ActorCritic(policy, critic, settings, guards, StepClock(made.watch.at))
        groups = responses(made.engine.hf.vocab_size)
        apart, last, same = first_values(value.engine, groups)
        learned = learner.learn(0, Collected(groups, None))
        made.export(Path(out, "policy"), torch.float32, {})
        value.export(Path(out, "value"), torch.float32, {})
        return {
            "value": [(each.loss.loss, each.update.grad_norm) for each in learned.value_updates],
            "policy": [(each.loss.loss, each.update.grad_norm) for each in learned.updates],
            "figures": dict(learned.figures),
            "advantages": learned.advantages,
            "apart": apart,
            "last": last,
            "same": same,
        }


def first_values(value: Engine, groups: list[list[TrainedResponse]]) -> tuple[float, dict[int, float], bool]:
    """The largest difference of the values on the last tokens from what a reward model of the rewards says of the same responses,
    in packs of other sizes; these values, by response; whether every value has the bits of a score in the same packs, made as
    `tulu-mega score` makes them. 0, nothing and True where this rank sees none."""
    every = [one for group in groups for one in group]
    scores = RewardModelScores(value, 64)([one.response for one in every])
    scores = from_lead(scores)
    packs = packed(value, every, response_jobs.CAPACITY, False, True).packs
    given = {one.number: one.response.token_ids for one in every}
    whole = [
        [TokenizedRow(number, given[number], given[number]) for number in each.rows_S.tolist() if number >= 0] for each in packs
    ]
    scored = value.score(packs), value.score([pack(rows, pack_alignment(value.settings)) for rows in whole])
    found, same = {}, True
    for batch, values_T, scores_T in zip(packs, *scored, strict=False):
        at = torch.isin(batch.segments_T, (batch.rows_S >= 0).nonzero().squeeze(1))
        same = same and torch.equal(values_T[at], scores_T[at])
        for segment, number in enumerate(batch.rows_S.tolist()):
            # a response that ends with what a tool said is scored there, and valued on its last trained token
            if number >= 0 and every[number].response.segments[-1].trained:
                found[number] = float(values_T[batch.ends_T & (batch.segments_T == segment)])
    return max((abs(found[number] - scores[number]) for number in found), default=0.0), found, same
