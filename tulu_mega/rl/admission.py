"""The order in which prompts are asked and trained on, so that no response is trained on by weights that are too new for it.

Pure: it knows places in the stream of prompts and verdicts on them, no servers and no clock.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple


@dataclass(frozen=True)
class Share:
    """The places of the stream that belong to a step: those that are trained on, and those that nothing can be learned from."""

    step: int
    """steps done before it"""
    first: int
    end: int
    """the place after its last one"""
    worth: int
    """places whose groups are trained on"""
    rounds: int
    """times that prompts were drawn for it: once, and once for each refill"""


class _Filling(NamedTuple):
    """The step that the next place belongs to."""

    step: int
    first: int
    """its first place"""
    worth: int
    """groups to train on that it has"""
    left: int
    """places of its round that have no verdict yet"""
    rounds: int


class Admission:
    """Deals the places of the stream to steps, in order, and says how many more may be asked of which weights.

    A step draws as many places as it trains on, then as many again as of these taught nothing, `tries` times in all; so which
    places are a step's follows from the verdicts in their order alone, whenever these come and whatever the lag. A step that
    has drawn its last round trains on what it has. Nothing is dropped: each place belongs to one step.

    Weights of version v may be asked places that belong to no later step than `v + lag`, even if every place that has no verdict
    yet turns out to be worth training on: a place that teaches nothing never moves later places to a later step. So the bound
    holds whatever the verdicts are.

    Args:
        batch: groups that a step trains on.
        lag: steps by which the weights that answer may be older than those that train.
        tries: rounds that a step may draw.
        step: steps done.
        place: first place that no step has had yet.
    """

    def __init__(self, batch: int, lag: int, tries: int = 1, step: int = 0, place: int = 0):
        if batch < 1 or lag < 0 or tries < 1:
            raise ValueError(f"expected batch and tries of at least 1 and lag of at least 0, got {batch}, {tries} and {lag}")
        self.batch, self.lag, self.tries = batch, lag, tries
        self._next = self._front = place
        self._filling = self._begun(step, place)
        self._told: dict[int, bool] = {}
        """verdicts on places behind one that has none"""
        self._shares: deque[Share] = deque()
        """of steps that have all their places and are not trained yet"""

    @property
    def place(self) -> int:
        """The next place of the stream that is asked."""
        return self._next

    @property
    def outstanding(self) -> int:
        """Places that are asked and have no verdict."""
        return self._next - self._front - len(self._told)

    @property
    def need(self) -> int:
        """Places that the step being filled waits for and nobody is asked yet, as far as is known; 0 while verdicts are."""
        return max(0, self._filling.left - (self._next - self._front))

    def room(self, version: int, last: int | None = None) -> int:
        """How many more places may be asked of weights of a version.

        Args:
            last: the last step that is to be, counted from 0, if there is one: nothing is asked for later ones.
        """
        latest = version + self.lag if last is None else min(version + self.lag, last)
        filling = self._filling
        for place in range(self._front, self._next):  # what has no verdict counts as worth training on
            filling = self._walked(filling, place, self._told.get(place, True))[0]
        own = self.batch - filling.worth if filling.rounds < self.tries else filling.left
        return max(0, own + (latest - filling.step) * self.batch)

    def admit(self, count: int, version: int) -> range:
        """Take the next places of the stream, to be asked of weights of a version.

        Raises:
            ValueError: there is no room for them.
        """
        if count > (room := self.room(version)):
            raise ValueError(f"{count} places are to be asked of version {version}, which has room for {room}")
        self._next += count
        return range(self._next - count, self._next)

    def withdraw(self, first: int) -> None:
        """Take back the places from `first` on, which nobody has answered: they are asked again.

        Raises:
            ValueError: there are verdicts on some.
        """
        if first < self._front or any(place >= first for place in self._told):
            raise ValueError(f"places from {first} on are not all without a verdict")
        self._next = first

    def tell(self, place: int, worth: bool) -> None:
        """Note the verdict on a place.

        Args:
            worth: whether its group is to be trained on.

        Raises:
            ValueError: the place is not asked, or has its verdict.
        """
        if not self._front <= place < self._next or place in self._told:
            raise ValueError(f"place {place} is not one that waits for its verdict")
        self._told[place] = worth
        while self._front in self._told:
            self._filling, share = self._walked(self._filling, self._front, self._told.pop(self._front))
            self._front += 1
            if share:
                self._shares.append(share)

    def closed(self, step: int) -> bool:
        """Whether a step has all its places."""
        return self._filling.step > step

    def take(self, step: int) -> Share:
        """The places of the next step, which is trained now.

        Raises:
            ValueError: it is another step's turn, or this one has not all its places.
        """
        if not self._shares or self._shares[0].step != step:
            raise ValueError(f"step {step} cannot be trained now: {self._shares[0].step if self._shares else 'none'} is ready")
        return self._shares.popleft()

    @property
    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, as JSON has it."""
        return {
            "next": self._next,
            "front": self._front,
            "filling": self._filling._asdict(),
            "told": [[place, worth] for place, worth in sorted(self._told.items())],
            "shares": [asdict(share) for share in self._shares],
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from the state of a checkpoint."""
        self._next, self._front = state["next"], state["front"]
        self._filling = _Filling(**state["filling"])
        self._told = dict(map(tuple, state["told"]))
        self._shares = deque(Share(**share) for share in state["shares"])

    def _begun(self, step: int, place: int) -> _Filling:
        return _Filling(step, place, 0, self.batch, 1)

    def _walked(self, filling: _Filling, place: int, worth: bool) -> tuple[_Filling, Share | None]:
        """The step being filled after the verdict on its next place, and the share of one that has all its places by it."""
        step, first, found, left, rounds = filling
        found, left = found + worth, left - 1
        if left:
            return _Filling(step, first, found, left, rounds), None
        lacking = self.batch - found
        if lacking and rounds < self.tries:
            return _Filling(step, first, found, lacking, rounds + 1), None
        return self._begun(step + 1, place + 1), Share(step, first, place + 1, found, rounds)
