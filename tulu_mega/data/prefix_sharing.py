"""Sequences that begin with the same tokens, which a pack then holds once: the responses to a prompt."""

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
class Family:
    """One or several sequences, of whose tokens a pack holds the shared ones once and each one's last not at all.

    The last token predicts nothing, so nobody looks at what becomes of it. Neither does anybody at a shared token's: all that is
    trained is predicted by a sequence's own tokens, of which the first is the last that it has in common with the others.
    """

    sequences: tuple[TokenizedRow, ...]
    shared: int
    """tokens"""

    @property
    def size(self) -> int:
        """Tokens in a pack."""
        return self.shared + sum(self.own(sequence) for sequence in self.sequences)

    def own(self, sequence: TokenizedRow) -> int:
        """Tokens that one of them has in a pack for itself."""
        return len(sequence.input_ids) - 1 - self.shared

    def cost(self, cost: Cost) -> float:
        """Of all of them, the shared tokens computed once."""
        whole = sum(cost(len(sequence.input_ids) - 1) for sequence in self.sequences)
        return whole - (len(self.sequences) - 1) * cost(self.shared)


def related(sequences: Sequence[TokenizedRow]) -> list[list[TokenizedRow]]:
    """Neighbours whose tokens up to the first trained one are the same, together."""
    return [list(members) for _, members in groupby(sequences, key=_beginning)]


def _beginning(sequence: TokenizedRow) -> list[int] | int:
    """The tokens that others may share; something of its own where nothing is trained."""
    untrained = _untrained(sequence)
    return sequence.row if untrained is None else sequence.input_ids[:untrained]


def _untrained(sequence: TokenizedRow) -> int | None:
    """Tokens before the first trained one."""
    return next((at for at, label in enumerate(sequence.labels) if label != IGNORE), None)


def plan_families(
    sequences: Sequence[TokenizedRow],
    data_parallel: int,
    capacity: int,
    align: Alignment,
    cost: Cost,
    pipeline: Pipeline,
    share: bool,
) -> list[list[list[Family]]]:
    """Splits one global batch: ``plan[rank][micro_batch]``, as :func:`tulu_mega.data.packing.plan_step` but of families.

    Few large families leave ranks uneven, many small ones compute a prefix many times. Whole ones, halves, quarters and so on are
    planned, and the plan that ends first is taken, the one of the larger families on a tie.

    Args:
        sequences: with at least two tokens each.
        data_parallel, capacity, align, cost, pipeline: as for `plan_step`.
        share: whether neighbours that begin alike become families; else each sequence is one. Families of several need an
            alignment that asks nothing of sequences: no context parallelism.

    Raises:
        UserError: as `plan_step`.
    """
    together = related(sequences) if share else [[sequence] for sequence in sequences]
    room = capacity // align.total * align.total
    most = max(map(len, together), default=1)
    plans = []
    while not plans or most > 1:
        most = -(-most // 2) if plans else most
        families = [family for members in together for family in _cut(members, most, room)]
        sizes = [align.padded_sequence(family.size) for family in families]
        costs = [family.cost(cost) for family in families]
        plan = plan_groups(sizes, costs, data_parallel, capacity, align, multiple=pipeline.multiple, pipeline=pipeline)
        ends = simulate([[sum(costs[at] for at in bin_) for bin_ in rank] for rank in plan], pipeline).makespan
        plans.append((ends, [[[families[at] for at in bin_] for bin_ in rank] for rank in plan]))
    return min(plans, key=lambda made: made[0])[1]


def _cut(members: list[TokenizedRow], most: int, room: int) -> list[Family]:
    """Families of at most so many members, as alike in number as can be, that go into a pack (single ones need not)."""
    for parts in range(-(-len(members) // most), len(members) + 1):
        bounds = [len(members) * part // parts for part in range(parts + 1)]
        families = [_family(tuple(members[a:b])) for a, b in pairwise(bounds)]
        if all(len(family.sequences) == 1 or family.size <= room for family in families):
            break
    return families


def _family(members: tuple[TokenizedRow, ...]) -> Family:
    return Family(members, max((_untrained(members[0]) or 0) - 1, 0) if len(members) > 1 else 0)
