"""A policy that trains on the responses of its own servers: what the recipes of reinforcement learning share."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from tulu_mega.config import PolicyRunSettings
from tulu_mega.config.policy_run import steps_of
from tulu_mega.data.chat import Template
from tulu_mega.distributed.collectives import Crew, from_lead
from tulu_mega.errors import UserError
from tulu_mega.launch.launcher import World
from tulu_mega.launch.run_dir import CONFIG
from tulu_mega.objectives.advantages import AdvantageEstimator
from tulu_mega.objectives.policy import PolicyObjective
from tulu_mega.pins.record import first_day
from tulu_mega.process import Collections
from tulu_mega.resilience.guards import Guards
from tulu_mega.rl import journal, under_way
from tulu_mega.rl.collector import Collected, Collector
from tulu_mega.rl.evaluator import Evaluator
from tulu_mega.rl.fleet import CutOff, Fleet, FleetClient
from tulu_mega.rl.judging import Rewards
from tulu_mega.rl.learner import Learned, Learner, Trained
from tulu_mega.rl.prompts import Prompts, read, write_rejects
from tulu_mega.rl.reporter import Reporter
from tulu_mega.rl.reward_model import RewardModelScores
from tulu_mega.rl.scheduler import Scheduler
from tulu_mega.train.adapter_figures import adapter_figures
from tulu_mega.train.adapter_reference import AdapterReference
from tulu_mega.train.engine import Engine
from tulu_mega.train.profiling import StepProfiler
from tulu_mega.train.run import Beside, Run, opened_session
from tulu_mega.train.save_schedule import SaveSchedule
from tulu_mega.train.session import Session, write_settings
from tulu_mega.train.step_clock import StepClock
from tulu_mega.weight_transfer.attach import Connection, attach
from tulu_mega.weight_transfer.push import SyncReport
from tulu_mega.weight_transfer.server import ServerAddress


class Method(Protocol):
    """What one algorithm differs in from another."""

    @property
    def estimator(self) -> AdvantageEstimator:
        """Gives the responses to a prompt their advantages, on rank 0."""

    @property
    def objective(self) -> PolicyObjective:
        """What the policy minimises."""

    def beside(self, session: Session) -> Mapping[str, Beside]:
        """Build the other models that train, by name, weights loaded. Every rank calls it."""

    def learner(self, policy: Trained, beside: Mapping[str, Beside], guards: Guards, clock: StepClock) -> Learner:
        """Make what updates the models."""


@dataclass(frozen=True)
class Policy:
    """A policy in training, on one rank: its parts, and what a step does with each."""

    run: Run
    chat: tuple[Template, tuple[int, ...]]
    """The template that the prompts were made by, and the tokens that end a response; rank 0's count."""
    done: int
    """Steps done when the run began."""
    steps: int
    """Steps of the whole run."""
    guards: Guards
    clock: StepClock
    collector: Collector
    learner: Learner
    fleet: Fleet
    evaluator: Evaluator
    reporter: Reporter | None
    """Rank 0's."""
    saves: SaveSchedule
    profiler: StepProfiler

    def train(self) -> None:
        """Make the steps that are left: collect responses, learn from them, give the servers the new weights,
        evaluate, report, save. Export what was learned at the end.

        Raises:
            UserError: on every rank, for whatever the user can mend.
            Stopped: on every rank, when one was asked to end.
        """
        self.sync(self.done)
        self.evaluate(self.done)
        with self.guards, Collections(every=1) as collections:
            for step in range(self.done, self.steps):
                with self.profiler.step(step + 1):
                    with self.saving_where_cut_off(step):
                        collected = self.collect(step)
                    learned = self.learn(step, collected)
                    with self.saving_where_cut_off(step + 1, collected, learned):
                        sync = self.sync(step + 1)
                        heldout = self.evaluate(step + 1)
                    self.report(step + 1, collected, learned, sync, heldout)
                    self.save(step + 1, learned)
                collections.after_step(step + 1)
        self.finish()

    def collect(self, step: int) -> Collected:
        """Collect the step's responses, judged, of the newest weights; every rank gets those that are trained on."""
        self.guards.before_step(step + 1)
        self.clock.restart()
        with self.clock.part("collecting"):
            return self.collector.collect(step)

    def learn(self, step: int, collected: Collected) -> Learned:
        """Make the step's updates."""
        return self.learner.learn(step, collected)

    def sync(self, version: int) -> SyncReport:
        """Give the servers the newest weights, once they have answered what they are asked."""
        with self.clock.part("waiting"):
            self.collector.quiet()
        with self.clock.part("sync"):
            return self.fleet.push(version)

    def evaluate(self, done: int) -> dict[str, float]:
        """Return the figures of the held-out prompts; nothing where no evaluation is due."""
        if not self.evaluator.due(done):
            return {}
        with self.clock.part("evaluation"):
            return self.evaluator.evaluate(done)

    def report(self, done: int, collected: Collected, learned: Learned, sync: SyncReport, heldout: dict[str, float]) -> None:
        """Write the step's line in metrics.jsonl, and its responses."""
        guards = self.guards.after_step(done)
        figures = {**heldout, **adapter_figures(self.run.session.engine)}
        if self.reporter:
            self.reporter.report(done, collected, learned, sync, figures, guards)

    def save(self, done: int, learned: Learned) -> None:
        """Save a checkpoint, when one is due: weights, optimizer, place among the prompts.

        Raises:
            Stopped: on every rank, after a checkpoint, when any received a signal to stop.
            UserError: on every rank, after a checkpoint, when a spike ends the run.
        """
        failure = None
        if learned.spike:
            failure = UserError(
                f"stopped at {learned.spike}. It and the later updates of this step were left out, and the step is saved; look "
                f"at its responses in {journal.rollouts_file(self.run.run_dir, done)}, then go on with --train.spike skip or warn"
            )
        self.saves.after_step(done, self._state, failure)

    @contextlib.contextmanager
    def saving_where_cut_off(
        self, done: int, collected: Collected | None = None, learned: Learned | None = None
    ) -> Iterator[None]:
        """Wrap what needs servers: where none is left, what was learned is saved before the run ends.

        Args:
            done: steps done.
            collected, learned: of the last of them, where it is not reported yet.

        Raises:
            CutOff: on every rank, once the checkpoint is on disk.
        """
        try:
            yield
        except CutOff as cut:
            if done == self.done:
                raise
            if learned is not None:
                self.report(done, collected, learned, SyncReport(done, 0.0, 0.0, 0), {})
            told = f"step {done} is saved: the same command goes on from there once the servers answer"
            self.saves.end(done, self._state(), CutOff([*cut.problems, told]))

    def finish(self) -> None:
        """Wait for the last checkpoint, and export the model in Hugging Face format."""
        self.saves.finish()
        self.run.export(self.guards, *self.chat)

    def _state(self) -> dict[str, Any]:
        return {**self.guards.state, **self.learner.state, "prompts": self.collector.state()}


@contextlib.contextmanager
def opened_policy(settings: PolicyRunSettings, world: World, method: Method) -> Iterator[Policy]:
    """Join the world, build the models, find the servers, read the prompts.

    Args:
        method: what is done with them.

    Raises:
        UserError: on every rank, for whatever the user can mend.
    """
    with contextlib.ExitStack() as stack:
        temperature, shares = settings.sampling.temperature, settings.train.share_prompts
        session = stack.enter_context(opened_session(settings, world, False, temperature, shares, settings.lora))
        beside = method.beside(session)
        run, engine, lead = Run(settings, session, beside=beside), session.engine, session.lead
        prompts = read(settings, first_day(Path(settings.run_dir))) if lead else None
        steps = from_lead(steps_of(settings, len(prompts.train)) if lead else None)

        reference = _reference(session, run) if settings.policy.reads_reference else None
        found = run.weights(steps, settings.train.mini_batches * settings.train.passes)
        start = found.step if found else 0
        scores = None
        if settings.rewards.model:
            scores = RewardModelScores(session.beside(settings.rewards.model, reward=True).engine, settings.longest)

        def connect(servers: Sequence[ServerAddress]) -> Connection:
            return attach(session.sender(settings.rollout), servers, settings.rollout)

        fleet = stack.enter_context(Fleet(connect, settings.rollout, run.run_dir))
        crew = Crew({"push": fleet.push, "reward": scores})
        objective = method.objective
        guards = run.guards(found, spike_signals=("grad_norm",))
        clock = StepClock(session.watch.at)
        learner = method.learner(Trained(engine, objective, reference), beside, guards, clock)
        if found:
            learner.restore(found.state)

        scheduler = log = reporter = None
        if lead:
            ask = partial(crew.do, "reward") if scores else None
            rewards = stack.enter_context(Rewards(settings.rewards, prompts.verifiers, prompts.tokenizer, ask))
            client = FleetClient(fleet, partial(crew.do, "push"))
            scheduler = Scheduler(prompts.train, client, rewards, method.estimator, settings, prompts.ends, steps)
            if found:
                under_way.restore(scheduler, rewards, found.state["prompts"], found.step, found.path)
        collector = Collector(crew, scheduler, settings.train.max_policy_lag > 0)
        saves = run.saves(steps, guards, collector.files)
        if lead:
            write_settings(settings, run.run_dir / CONFIG)
            log = stack.enter_context(run.metrics(steps, start))
            write_rejects(prompts)
            _announce(session, settings, prompts, start, steps)
            reporter = Reporter(settings, engine.hf.to_dict(), objective.largest, steps, log, clock, saves)

        every, heldout = (settings.heldout.every, prompts.heldout if lead else None) if settings.heldout else (0, None)
        yield Policy(
            run=run,
            chat=(prompts.template, prompts.ends) if prompts else ("tokenizer", ()),
            done=start,
            steps=steps,
            guards=guards,
            clock=clock,
            collector=collector,
            learner=learner,
            fleet=fleet,
            evaluator=Evaluator(crew, run.run_dir, every, start, steps, scheduler, heldout, log),
            reporter=reporter,
            saves=saves,
            profiler=run.profiler(start),
        )


def _reference(session: Session, run: Run) -> Engine | AdapterReference:
    """The model that the run began with: a second one, or of a run with adapters the same one with those that it began with."""
    if session.engine.lora is None:
        return session.beside(session.settings.model.path, reward=False).engine
    run.initial_weights()
    return AdapterReference(session.engine)


def _announce(session: Session, settings: PolicyRunSettings, prompts: Prompts, start: int, steps: int) -> None:
    """Print what the run trains, and on what."""
    rejects = f" ({len(prompts.train.rejects):,} rows not used: {prompts.rejects})" if prompts.train.rejects else ""
    at = f", going on after step {start}" if start else ""
    drawn = f"{settings.train.prompts} x {settings.sampling.samples} responses a step"
    print(
        f"{session.topology} · {settings.model.path} · {len(prompts.train):,} prompts{rejects} · {drawn} · {steps:,} steps{at}",
        flush=True,
    )
    if settings.sampling.top_p < 1:
        print(
            f"warning: sampling.top_p = {settings.sampling.top_p}: responses are drawn from a part of the distribution, "
            "all of which is trained; 1.0 trains what is sampled",
            file=sys.stderr,
            flush=True,
        )
