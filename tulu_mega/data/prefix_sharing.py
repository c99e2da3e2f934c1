"""Shares prefixes: what sequences begin with in common, as responses to a prompt do, comes once in a pack."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise

from tulu_mega.data.packing import plan_groups
from tulu_mega.layout.alignment import Alignment
from tulu_mega.layout.cost import Cost
from tulu_mega.layout.schedule import Pipeline, simulate
from tulu_mega.records import IGNORE, TokenizedRow


@dataclass(frozen=True)
class PrefixGroup:
    """One or several sequences with a common prefix; a pack holds the shared tokens once.

    A sequence's last token predicts nothing, and is in the pack only where something is read on it. The last token that all have
    in common is not shared but repeated in each sequence, because it may predict that sequence's first trained token. So no
    shared token predicts a trained one. Behind the prefix, trained and untrained tokens may alternate.
    """

    sequences: tuple[TokenizedRow, ...]
    shared: int
    """tokens that are shared"""
    ends: bool = False
    """whether the pack holds each sequence's last token, too, on which a score is read"""

    @property
    def size(self) -> int:
        """Tokens of the group in a pack."""
        return self.shared + sum(self.own(sequence) for sequence in self.sequences)

    def own(self, sequence: TokenizedRow) -> int:
        """Tokens in a pack that are one sequence's own."""
        return self._length(sequence) - self.shared

    def _length(self, sequence: TokenizedRow) -> int:
        return len(sequence.input_ids) - (not self.ends)

    def cost(self, cost: Cost) -> float:
        """Cost of all sequences, with the shared tokens computed once."""
        whole = sum(cost(self._length(sequence)) for sequence in self.sequences)
        return whole - (len(self.sequences) - 1) * cost(self.shared)


def related(sequences: Sequence[TokenizedRow]) -> list[list[TokenizedRow]]:
    """Lists of neighbours whose tokens before the first trained one are the same."""
    return [list(members) for _, members in groupby(sequences, key=_beginning)]


def _beginning(sequence: TokenizedRow) -> list[int] | int:
    """The tokens before the first trained one, which others may share; the sequence's row where nothing is trained."""
    untrained = _untrained(sequence)
    return sequence.row if untrained is None else sequence.input_ids[:untrained]


def _untrained(sequence: TokenizedRow) -> int | None:
    """Number of tokens before the first trained one; None where nothing is trained."""
    return next((at for at, label in enumerate(sequence.labels) if label != IGNORE), None)


def plan_prefix_groups(
    sequences: Sequence[TokenizedRow],
    data_parallel: int,
    capacity: int,
    align: Alignment,
    cost: Cost,
    pipeline: Pipeline,
    share: bool,
    ends: bool = False,
) -> list[list[list[PrefixGroup]]]:
    """Split one global batch into ``plan[rank][micro_batch]``, as :func:`tulu_mega.data.packing.plan_step`, by prefix groups.

    Few large groups leave ranks uneven, many small ones compute a prefix many times. Whole groups, halves, quarters and so on
    are planned, and the plan that ends first is taken, on a tie the one of the larger groups.

    Args:
        sequences: with at least two tokens each.
        data_parallel, capacity, align, cost, pipeline: as for `plan_step`.
        share: whether neighbours that begin alike become groups; else each sequence is one. Groups of several need an
            alignment that asks nothing of sequences: no context parallelism.
        ends: see :class:`PrefixGroup`.

    Raises:
        UserError: as `plan_step`.
    """
    together = related(sequences) if share else [[sequence] for sequence in sequences]
    room = capacity // align.total * align.total
    most = max(map(len, together), default=1)
    plans = []
    while not plans or most > 1:
        most = -(-most // 2) if plans else most
        groups = [group for members in together for group in _cut(members, most, room, ends)]
        sizes = [align.padded_sequence(group.size) for group in groups]
        costs = [group.cost(cost) for group in groups]
        plan = plan_groups(sizes, costs, data_parallel, capacity, align, multiple=pipeline.multiple, pipeline=pipeline)
        makespan = simulate([[sum(costs[at] for at in bin_) for bin_ in rank] for rank in plan], pipeline).makespan
        plans.append((makespan, [[[groups[at] for at in bin_] for bin_ in rank] for rank in plan]))
    return min(plans, key=lambda made: made[0])[1]


def _cut(members: list[TokenizedRow], most: int, room: int, ends: bool) -> list[PrefixGroup]:
    """Groups of at most `most` sequences, of sizes as equal as can be, that fit into a pack; single sequences need not."""
    for parts in range(-(-len(members) // most), len(members) + 1):
        bounds = [len(members) * part // parts for part in range(parts + 1)]
        groups = [_group(tuple(members[a:b]), ends) for a, b in pairwise(bounds)]
        if all(len(group.sequences) == 1 or group.size <= room for group in groups):
            break
    return groups


def _group(members: tuple[TokenizedRow, ...], ends: bool) -> PrefixGroup:
    return PrefixGroup(members, max((_untrained(members[0]) or 0) - 1, 0) if len(members) > 1 else 0, ends)
