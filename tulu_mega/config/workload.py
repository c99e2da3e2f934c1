"""What a step of a training stage is made of, as `tulu-mega plan` needs it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tulu_mega.config.rollout import RolloutSettings
    from tulu_mega.config.run import PreferenceStageSettings, StageSettings
    from tulu_mega.config.sections import ParallelSettings

_SIDE = 600
"""Mean tokens of a side of a pair of Tulu 3's preference mixtures; a pair takes some 1,200."""


@dataclass(frozen=True, kw_only=True)
class ValueWork:
    """A value model that trains beside a policy, on the same sequences."""

    path: str
    """of the directory whose config.json tells its architecture"""
    parallel: ParallelSettings
    """its layout"""
    updates: int
    """of it, for each of the policy's"""
    scorings: int = 1
    """times a step that its values are computed without training"""


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A step of a training stage: its sequences, its updates and what they need beside the model that is trained."""

    rows: int
    """rows of the data in a step: conversations, pairs or prompts"""
    mean_length: int
    """mean tokens of a sequence of a row, where nobody gives another"""
    longest_row: int
    """most tokens that it may have"""
    sides: int = 1
    """sequences of a row, which are packed together: 2 of a pair"""
    samples: int = 0
    """responses that are sampled to each row, a prompt, and trained; 0: the rows are trained"""
    longest_response: int = 0
    """most tokens that a sampled response may have"""
    pack_length: int | None = None
    """tokens of a micro-batch; a whole row of the longest sequences when None"""
    micro_batches: int | None = None
    """on each data-parallel rank; the fewest that hold the rows when None"""
    mini_batches: int = 1
    """updates that a step's sequences are split into"""
    passes: int = 1
    """times that they are trained on"""
    scorings: int = 0
    """times a step that log-probabilities of its sequences are computed without training"""
    scores_once: bool = False
    """log-probabilities of all rows are computed before the first step"""
    reference: bool = False
    """the initial weights are held beside those that are trained"""
    rewards: str | None = None
    """directory of a reward model that is held beside, in the same layout, and scores all responses once"""
    value: ValueWork | None = None
    """a value model that trains beside, of an architecture of its own"""
    adapters: bool = False
    """low-rank adapters train, beside frozen weights"""
    entropy: bool = False
    """the loss has the entropy in it, whose gradient takes memory"""
    rollout: RolloutSettings | None = None
    """servers that sample the responses and are sent the weights"""
    beside: bool = False
    """servers sample responses while a step trains"""

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence that is trained."""
        return self.longest_row + self.longest_response

    @property
    def capacity(self) -> int:
        """Tokens of a micro-batch."""
        return self.pack_length or self.sides * self.longest

    @property
    def updates(self) -> int:
        """Optimizer steps of a step."""
        return self.mini_batches * self.passes


def of_rows(settings: StageSettings, mean_length: int, sides: int = 1, scores_once: bool = False) -> Workload:
    """The workload of a stage that trains on the rows of a fixed data set.

    Args:
        mean_length, sides, scores_once: as :class:`Workload` has them.
    """
    return Workload(
        rows=settings.train.global_batch,
        mean_length=mean_length,
        longest_row=settings.data.max_length,
        sides=sides,
        pack_length=settings.data.pack_length,
        micro_batches=settings.train.micro_batches,
        scores_once=scores_once,
        adapters=settings.lora is not None,
    )


def of_pairs(settings: PreferenceStageSettings, scores_once: bool = False) -> Workload:
    """The workload of a stage that trains on pairs.

    Args:
        scores_once: as :class:`Workload` has it.
    """
    return of_rows(settings, _SIDE, 2, scores_once)
