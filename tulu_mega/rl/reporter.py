"""The report of a policy's step: its record in metrics.jsonl and its responses. Rank 0 only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tulu_mega.config import PolicyRunSettings
from tulu_mega.resilience.guards import GuardReport
from tulu_mega.rl import journal
from tulu_mega.rl.batches import effective_share
from tulu_mega.rl.collector import Collected, numbered
from tulu_mega.rl.learner import Learned
from tulu_mega.train.batch_loss import BatchLoss
from tulu_mega.train.metrics import MetricsLog, StepRecord, StepSeconds
from tulu_mega.train.save_schedule import SaveSchedule
from tulu_mega.train.step_clock import StepClock
from tulu_mega.weight_transfer.push import SyncReport

TOLD = ("reward", "solve_rate", "response_length", "kl")
"""Names of the figures that the console line shows beside the loss."""


@dataclass(frozen=True)
class Reporter:
    """Writes the report of each step."""

    settings: PolicyRunSettings
    hf: dict
    """The model's config.json."""
    largest: tuple[str, ...]
    """Names of the objective's metrics that are maxima, not means."""
    steps: int
    """Steps of the whole run."""
    log: MetricsLog
    clock: StepClock
    saves: SaveSchedule

    def report(
        self,
        done: int,
        collected: Collected,
        learned: Learned,
        sync: SyncReport,
        heldout: Mapping[str, float],
        guards: GuardReport,
    ) -> None:
        """Write the step's responses, if due, and its record.

        Args:
            done: finished steps.
            sync: of the weights that the step made.
            heldout: figures of the evaluation; none without one.
        """
        notable = learned.spike or not collected.groups
        if notable or done % self.settings.train.rollouts_every == 0 or done == self.steps:
            places = {number: (group.place, at) for number, group, at in numbered(collected.rollouts)}
            differences = {places[number]: (one.mean, one.largest) for number, one in learned.differences.items()}
            means = learned.advantages
            means = None if means is None else {places[number]: value for number, value in means.items()}
            journal.write_rollouts(Path(self.settings.run_dir), done, collected.rollouts, differences, means)
        self.log.step(self._record(done, collected, learned, sync, heldout), guards)

    def _record(
        self, done: int, collected: Collected, learned: Learned, sync: SyncReport, heldout: Mapping[str, float]
    ) -> StepRecord:
        seconds, updates, responses = self.clock.seconds, learned.updates, collected.responses
        lengths = [one.response.num_tokens for one in responses]
        tokens, trained = sum(lengths), sum(one.response.num_trained for one in responses)
        passes = self.settings.train.passes
        whole = self.clock.whole
        computed = sum(seconds.get(name, 0.0) for name in ("data", "scoring", "forward_backward", "optimizer"))
        extra = {
            **over_updates([each.loss for each in updates], [each.tokens for each in updates], self.largest),
            **collected.rollouts.figures(),
            **({"effective_samples": effective_share(learned.differences.values())} if learned.differences else {}),
            "seconds_generation": collected.rollouts.generating + seconds.get("waiting", 0.0),
            **learned.figures,
            **heldout,
            "seconds_scoring": seconds.get("scoring", 0.0),
            "seconds_sync": seconds.get("sync", 0.0),
            "seconds_evaluation": seconds.get("evaluation", 0.0),
            "sync_gigabytes_per_second": sync.gigabytes_per_second,
            "trainer_idle": 1 - computed / whole,
            "sampler_idle": 1 - collected.rollouts.answering / whole,
            "tokens_spared": sum(learned.repeated) / max(tokens, 1),
            "updates": len(updates),
        }
        return StepRecord(
            step=done,
            loss=_mean([each.loss.loss for each in updates]),
            grad_norm=_mean([each.update.grad_norm for each in updates]),
            lr=updates[-1].update.lr if updates else 0.0,
            tokens=tokens * passes,
            supervised_tokens=trained * passes,
            padding=1 - learned.own_tokens / max(learned.packed_tokens, 1),
            flops=learned.flops,
            seconds=StepSeconds(
                seconds.get("data", 0.0),
                seconds.get("scoring", 0.0) + seconds.get("forward_backward", 0.0),
                seconds.get("optimizer", 0.0),
                self.saves.take_seconds(),
            ),
            extra=extra,
            told=tuple(name for name in TOLD if name in extra),
        )


def over_updates(losses: list[BatchLoss], tokens: list[int], largest: tuple[str, ...]) -> dict[str, float]:
    """Combine the objective's metrics over a step: the mean over its trained tokens, or the maximum.

    Args:
        losses: of each update. Their counts may be of responses, so they are no weights for a mean over tokens.
        tokens: trained tokens of each update.
        largest: names of the metrics that are maxima.
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
