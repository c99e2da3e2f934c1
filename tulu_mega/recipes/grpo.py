"""Reinforcement learning with verifiable rewards by groups of responses (Tulu 3.1; GRPO: Shao et al., arXiv 2402.03300)."""

from __future__ import annotations

import contextlib
import itertools
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from tulu_mega.config import GrpoSettings
from tulu_mega.distributed.collectives import Crew, from_lead, gathered_at_lead
from tulu_mega.errors import Stopped, UserError
from tulu_mega.launch.launcher import World
from tulu_mega.launch.run_dir import CONFIG, locked
from tulu_mega.layout.flops import training_flops
from tulu_mega.objectives.advantages import ESTIMATORS
from tulu_mega.objectives.policy import PolicyObjective
from tulu_mega.records import PackedBatch
from tulu_mega.resilience.spikes import Spikes
from tulu_mega.resilience.stop_signal import Ending
from tulu_mega.resilience.stragglers import Stragglers
from tulu_mega.rl import journal
from tulu_mega.rl.batches import TrainedResponse, differences, packed, scored, split, with_column
from tulu_mega.rl.fleet import Fleet
from tulu_mega.rl.judging import Rewards
from tulu_mega.rl.prompts import Prompts, read, write_rejects
from tulu_mega.rl.reward_model import RewardModelScores
from tulu_mega.rl.scheduler import Group, Scheduler, StepRollouts
from tulu_mega.train import checkpoint
from tulu_mega.train.engine import BatchLoss
from tulu_mega.train.metrics import MetricsLog, StepRecord, StepSeconds
from tulu_mega.train.run import Run, Skips
from tulu_mega.train.session import Session, opened, write_settings
from tulu_mega.weight_transfer.server import ServerAddress
from tulu_mega.weight_transfer.transfer import SyncReport, WeightSync

TOLD = ("reward", "solve_rate", "response_length", "kl")
"""What the console's line has beside the loss."""


def run(settings: GrpoSettings, world: World) -> None:
    """Each step: vLLM answers prompts with the newest weights, verifiers judge, Megatron learns, the weights go to vLLM.

    Goes on from the newest checkpoint in the run directory; exports the model at the end.

    Raises:
        UserError: on every rank, for whatever the user can mend.
        Stopped: on every rank, when one was asked to end.
    """
    with opened_policy(settings, world) as policy:
        policy.sync(policy.done)
        policy.evaluate(policy.done)
        with policy.ending:
            for step in range(policy.done, policy.steps):
                policy.collect(step)
                policy.learn(step)
                policy.sync(step + 1)
                policy.evaluate(step + 1)
                policy.report(step + 1)
                policy.save(step + 1)
        policy.finish()


@dataclass
class _Step:
    """What a step has come to so far."""

    at: Callable[[str], None]
    """told of each part that begins"""
    groups: list[list[TrainedResponse]] = field(default_factory=list)
    rollouts: StepRollouts | None = None
    """rank 0's"""
    losses: list[BatchLoss] = field(default_factory=list)
    """of each update"""
    trained: list[int] = field(default_factory=list)
    """tokens that each update trained on, over all ranks"""
    leapt: str = ""
    """what was too much of it, where the run ends for it"""
    norms: list[float] = field(default_factory=list)
    lr: float = 0.0
    apart: dict[int, tuple[float, float]] = field(default_factory=dict)
    """rank 0's: by response, mean and largest |log-probability by sampler less that by trainer|"""
    packed_tokens: int = 0
    """of this data-parallel rank, padding included"""
    own_tokens: int = 0
    """of them without padding"""
    repeated: list[int] = field(default_factory=list)
    """lengths of the prompts, of all ranks, that packs had already"""
    seconds: dict[str, float] = field(default_factory=dict)
    sync: SyncReport | None = None
    heldout: dict[str, float] = field(default_factory=dict)
    began: float = field(default_factory=time.perf_counter)

    @contextlib.contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Adds what the block takes to a name's seconds."""
        self.at(name)
        began = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - began

    @property
    def responses(self) -> list[TrainedResponse]:
        return [response for group in self.groups for response in group]


@dataclass
class Policy:
    """A policy in training, on one rank."""

    settings: GrpoSettings
    run: Run
    crew: Crew
    fleet: Fleet
    reference: Session | None
    prompts: Prompts | None
    """rank 0's"""
    scheduler: Scheduler | None
    """rank 0's"""
    steps: int
    objective: PolicyObjective
    saver: checkpoint.Saver
    skips: Skips
    spikes: Spikes
    stragglers: Stragglers
    ending: Ending
    done: int = 0
    log: MetricsLog | None = None
    """rank 0's"""
    empty_in_a_row: int = 0
    _saving: float = 0.0

    def __post_init__(self) -> None:
        self.now = _Step(self.session.watch.at)

    @property
    def session(self) -> Session:
        return self.run.session

    def collect(self, step: int) -> None:
        """Responses of the newest weights, judged; every rank gets those that are trained on."""
        self.session.watch.step(step + 1)
        self.now = _Step(self.session.watch.at)
        with self.now.timed("collecting"):
            self.now.groups = self.crew.share(partial(self._rollouts, step))

    def learn(self, step: int) -> None:
        """The updates of a step: each mini-batch in turn, as often as there are passes."""
        now, train, engine = self.now, self.settings.train, self.session.engine
        if not now.groups:
            self._nothing_to_learn(step)
            return
        self.empty_in_a_row = 0
        with now.timed("data"):
            capacity = self.settings.data.pack_length or self.settings.longest
            mini_batches = split(now.groups, train.mini_batches)
            trained = [sum(one.response.num_trained for one in part) for part in mini_batches]
            parts = [packed(engine, part, capacity, train.share_prompts) for part in mini_batches]
            batches = [part.packs for part in parts]
            now.packed_tokens = sum(len(pack.tokens_T) for packs in batches for pack in packs)
            now.own_tokens = sum(part.own_tokens for part in parts)
            now.repeated = [length for part in parts for length in part.repeated]
        with now.timed("scoring"):
            if self.reference:
                batches = [scored(self.reference.engine, part, "ref_logp_T") for part in batches]
            once = len(batches) * train.passes == 1  # the update's own forward pass is then the one by the old weights
            if not once:
                batches = [scored(engine, part, "old_logp_T") for part in batches]
        seen: list[Tensor] | None = [] if once else None
        updates = itertools.chain.from_iterable(itertools.repeat(list(zip(batches, trained, strict=True)), train.passes))
        for number, (part, tokens) in enumerate(updates):
            now.trained.append(tokens)
            self._update(step, step * train.mini_batches * train.passes + number, part, seen)
            if now.leapt:
                break
        now.apart = self._apart([with_column(batches[0], "old_logp_T", seen)] if once else batches)

    def sync(self, version: int) -> None:
        """The servers get the newest weights."""
        with self.now.timed("sync"):
            self.now.sync = self.fleet.push(version)

    def evaluate(self, done: int) -> None:
        """Greedy answers to the held-out prompts, when it is time."""
        wanted = self.settings.heldout
        fresh = done == 0 or done > self.done  # a run that goes on has evaluated already
        if not (wanted and fresh and (done % wanted.every == 0 or done == self.steps)):
            return
        with self.now.timed("evaluation"):
            self.now.heldout = self.crew.share(partial(self._evaluated, done))

    def report(self, done: int) -> None:
        """The step's line in metrics.jsonl, and its responses."""
        slowest = self.stragglers.report(done)
        if not self.session.lead:
            return
        now = self.now
        every, wrong = self.settings.train.rollouts_every, now.leapt or not now.groups
        if wrong or done % every == 0 or done == self.steps:
            places = {number: (group.place, at) for number, group, at in _numbered(now.rollouts)}
            apart = {places[number]: value for number, value in now.apart.items()}
            journal.write_rollouts(self.run.run_dir, done, now.rollouts, apart)
        self.log.step(self._record(done), slowest)

    def save(self, done: int) -> None:
        """A checkpoint, when it is time: weights, optimizer, place among the prompts.

        Raises:
            Stopped: on every rank, when one was asked to end; after a checkpoint then.
            UserError: on every rank, when the gradient leapt and that is to end the run; after a checkpoint, too.
        """
        self.saver.poll()
        asked, leapt = self.ending.asked(), self.now.leapt
        every = self.settings.checkpoint.every
        if asked or leapt or done == self.steps or (every and done % every == 0):
            began = time.perf_counter()
            prompts = from_lead(self.scheduler.state if self.session.lead else None)
            own = {"prompts": prompts, "empty_in_a_row": self.empty_in_a_row, "spikes": self.spikes.state}
            self.saver.save(done, self.skips.state | own)
            self._saving = time.perf_counter() - began
        if leapt:
            self.saver.finish()
            raise UserError(
                f"stopped at {leapt}. It and the later updates of this step were left out, and the step is saved; look at its "
                f"responses in {journal.rollouts_file(self.run.run_dir, done)}, then go on with --train.spike skip or warn"
            )
        if asked:
            self.saver.finish()
            raise Stopped(done)

    def finish(self) -> None:
        """The last checkpoint on disk, and the model in Hugging Face format."""
        self.saver.finish()
        self.run.export()

    def _rollouts(self, step: int) -> list[list[TrainedResponse]]:
        self.now.rollouts = self.scheduler.next(version=step)
        groups: dict[int, list[TrainedResponse]] = {}
        for number, group, at in _numbered(self.now.rollouts):
            if group.advantages.trained[at]:
                groups.setdefault(group.place, []).append(
                    TrainedResponse(number, group.judged[at].response, group.advantages.advantages[at])
                )
        return list(groups.values())

    def _evaluated(self, done: int) -> dict[str, float]:
        evaluation = self.scheduler.evaluate(self.prompts.heldout, version=done)
        journal.write_evaluation(self.run.run_dir, done, evaluation)
        figures = evaluation.figures()
        self.log.evaluated(done, figures)
        return figures

    def _update(self, step: int, number: int, batches: list[PackedBatch], seen: list[Tensor] | None) -> None:
        now, engine = self.now, self.session.engine
        with now.timed("forward_backward"), self.stragglers.working():
            loss = engine.forward_backward(batches, self.objective, seen)
        with now.timed("optimizer"), self.stragglers.working():
            update = engine.optimizer_step(number, loss.loss, self.spikes.allow)
        now.losses.append(loss)
        now.norms.append(update.grad_norm)
        now.lr = update.lr
        self.skips.note(update.finite, step + 1, loss.loss, update.grad_norm, self._rows, write=self.session.lead)
        self._look_at_spike(step + 1, len(now.losses))

    def _look_at_spike(self, step: int, update: int) -> None:
        found, self.spikes.found = self.spikes.found, ""
        if self.spikes.stops_for(found):
            self.now.leapt = f"update {update} of step {step}: {found}"
        elif found and self.session.lead:
            print(f"warning: update {update} of step {step}: {found}", file=sys.stderr, flush=True)

    def _rows(self) -> list[dict[str, Any]]:
        return [{"row": group.place, "where": group.prompt.where} for group in self.now.rollouts.groups]

    def _nothing_to_learn(self, step: int) -> None:
        self.empty_in_a_row += 1
        if self.empty_in_a_row >= self.settings.train.max_skipped:
            where = self.run.run_dir / journal.FOLDER
            raise UserError(
                f"stopped at step {step + 1}: in {self.empty_in_a_row} steps in a row no prompt had responses of different "
                f"rewards, so there is nothing to learn from; look at {where}: the task may be too hard, too easy, or judged "
                "wrongly"
            )

    def _apart(self, batches: list[list[PackedBatch]]) -> dict[int, tuple[float, float]]:
        """On rank 0, of every response; it is computed on the ranks that see log-probabilities."""
        place = self.session.topology
        mine = differences(itertools.chain.from_iterable(batches)) if place.reports_loss and place.context_rank == 0 else {}
        return {number: value for part in gathered_at_lead(mine) for number, value in part.items()}

    def _record(self, done: int) -> StepRecord:
        now, seconds = self.now, self.now.seconds
        responses = now.responses
        lengths = [one.response.num_tokens for one in responses]
        tokens, trained = sum(lengths), sum(one.response.num_trained for one in responses)
        passes = self.settings.train.passes
        scorings = ((len(now.losses) > 1) + bool(self.reference)) / 3  # of a forward and backward pass the forward one is a third
        hf = self.session.engine.hf.to_dict()
        flops = (training_flops(hf, lengths) - training_flops(hf, now.repeated)) * (passes + scorings)
        whole = time.perf_counter() - now.began
        computed = sum(seconds.get(name, 0.0) for name in ("data", "scoring", "forward_backward", "optimizer"))
        made = now.rollouts
        saving, self._saving = self._saving, 0.0
        extra = {
            **_over_updates(now.losses, now.trained, self.objective.largest),
            **made.figures(),
            **now.heldout,
            "seconds_scoring": seconds.get("scoring", 0.0),
            "seconds_sync": seconds.get("sync", 0.0),
            "seconds_evaluation": seconds.get("evaluation", 0.0),
            "sync_gigabytes_per_second": now.sync.gigabytes_per_second if now.sync else 0.0,
            "trainer_idle": 1 - computed / whole,
            "sampler_idle": 1 - made.generating / whole,
            "tokens_spared": sum(now.repeated) / max(tokens, 1),
            "updates": len(now.losses),
            "skipped_steps": self.skips.total,
            "spikes": self.spikes.total,
        }
        return StepRecord(
            step=done,
            loss=_mean([loss.loss for loss in now.losses]),
            grad_norm=_mean(now.norms),
            lr=now.lr,
            tokens=tokens * passes,
            supervised_tokens=trained * passes,
            padding=1 - now.own_tokens / max(now.packed_tokens, 1),
            flops=flops,
            seconds=StepSeconds(
                seconds.get("data", 0.0),
                seconds.get("scoring", 0.0) + seconds.get("forward_backward", 0.0),
                seconds.get("optimizer", 0.0),
                saving,
            ),
            extra=extra,
            told=tuple(name for name in TOLD if name in extra),
        )


def _numbered(rollouts: StepRollouts) -> Iterator[tuple[int, Group, int]]:
    """Every response that a step may train on: its number in the step, its group, its place there."""
    places = ((group, at) for group in rollouts.groups for at in range(len(group.judged)))
    return ((number, group, at) for number, (group, at) in enumerate(places))


def _over_updates(losses: list[BatchLoss], tokens: list[int], largest: tuple[str, ...]) -> dict[str, float]:
    """The objective's metrics over a step: means over its trained tokens, of some the largest.

    Args:
        losses: of each update. What these count may be responses, so it is no weight for a mean over tokens.
        tokens: that each trained on.
        largest: names of which it is the largest.
    """
    total, names = sum(tokens), losses[0].metrics if losses else ()
    return {
        name: max(loss.metrics[name] for loss in losses)
        if name in largest
        else sum(loss.metrics[name] * weight for loss, weight in zip(losses, tokens, strict=True)) / max(total, 1)
        for name in names
    }


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else 0.0


@contextlib.contextmanager
def opened_policy(settings: GrpoSettings, world: World) -> Iterator[Policy]:
    """Joins the world, builds the models, finds the servers, reads the prompts.

    Raises:
        UserError: on every rank, for whatever the user can mend.
    """
    with contextlib.ExitStack() as stack:
        lead = world.rank == 0
        run_dir = Path(settings.run_dir)
        if lead:
            stack.enter_context(locked(run_dir))
        session = stack.enter_context(opened(settings, world, settings.seed, reward=False))
        run = Run(settings, session)
        prompts = read(settings) if lead else None
        steps = from_lead(_steps(settings, len(prompts.train)) if lead else None)

        reference = session.beside(settings.model.path, reward=False) if settings.policy.reads_reference else None
        found = run.weights(steps, settings.train.mini_batches * settings.train.passes)
        skips = run.skips(settings.train.max_skipped)
        session.engine.temperature = settings.sampling.temperature
        if reference:
            reference.engine.temperature = settings.sampling.temperature

        scores = None
        if settings.rewards.model:
            scores = RewardModelScores(session.beside(settings.rewards.model, reward=True).engine, settings.longest)
        crew = Crew({"push": lambda version: fleet.push(version), "reward": scores})

        def connect(servers: Sequence[ServerAddress]) -> WeightSync:
            return WeightSync.connect(session.sender(settings.rollout), servers, settings.rollout)

        fleet = stack.enter_context(Fleet(connect, settings.rollout, run_dir, partial(crew.do, "push")))
        policy = Policy(
            settings=settings,
            run=run,
            crew=crew,
            fleet=fleet,
            reference=reference,
            prompts=prompts,
            scheduler=None,
            steps=steps,
            objective=PolicyObjective.of(settings.policy, settings.sampling.max_tokens),
            saver=checkpoint.Saver(
                session.engine, run.checkpoints, settings.checkpoint.keep, settings.checkpoint.format,
                settings.checkpoint.asynchronous,
            ),
            skips=skips,
            spikes=Spikes(settings.train.spike, signals=("grad_norm",)),
            stragglers=run.stragglers(),
            ending=Ending(session.engine.platform.device),
        )  # fmt: skip
        if found:
            policy.done, policy.empty_in_a_row = found.step, found.state["empty_in_a_row"]
            skips.restore(found.state)
            if "spikes" in found.state:  # not in checkpoints of before they were looked for
                policy.spikes.restore(found.state["spikes"])
        if lead:
            ask = partial(crew.do, "reward") if scores else None
            rewards = stack.enter_context(Rewards(settings.rewards, prompts.verifiers, prompts.tokenizer, ask))
            ends = (prompts.tokenizer.eos_token_id,)
            estimator = ESTIMATORS[settings.policy.advantages]
            policy.scheduler = Scheduler(prompts.train, fleet, rewards, estimator, settings, ends)
            if found:
                policy.scheduler.state = found.state["prompts"]
            write_settings(settings, run_dir / CONFIG)
            policy.log = stack.enter_context(run.metrics(steps, policy.done))
            write_rejects(prompts)
            print(_banner(policy), flush=True)
            if settings.sampling.top_p < 1:
                print(
                    f"warning: sampling.top_p = {settings.sampling.top_p}: responses are drawn from a part of the distribution, "
                    "all of which is trained; 1.0 trains what is sampled",
                    file=sys.stderr,
                    flush=True,
                )
        yield policy


def _steps(settings: GrpoSettings, prompts: int) -> int:
    train = settings.train
    return train.steps or math.ceil(round(train.epochs * prompts / train.prompts, 6))


def _banner(policy: Policy) -> str:
    settings, prompts = policy.settings, policy.prompts
    rejects = f" ({len(prompts.train.rejects):,} rows not used: {prompts.rejects})" if prompts.train.rejects else ""
    at = f", going on after step {policy.done}" if policy.done else ""
    drawn = f"{settings.train.prompts} x {settings.sampling.samples} responses a step"
    return (
        f"{policy.session.topology} · {settings.model.path} · {len(prompts.train):,} prompts{rejects} · {drawn} · "
        f"{policy.steps:,} steps{at}"
    )
