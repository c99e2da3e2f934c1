"""Which sequence goes into which packed micro-batch of which data-parallel rank."""

from __future__ import annotations

import heapq
import math
from bisect import bisect_left, insort
from collections.abc import Callable, Sequence

from tulu_mega.errors import UserError
from tulu_mega.layout.alignment import Alignment
from tulu_mega.layout.schedule import Pipeline, shortest_order

Bins = list[list[int]]

_EXCHANGES = 32
_NO_PIPELINE = Pipeline()


def plan_step(
    lengths: Sequence[int],
    data_parallel: int,
    capacity: int,
    align: Alignment,
    micro_batches: int | None = None,
    cost: Callable[[int], float] = float,
    multiple: int = 1,
    pipeline: Pipeline = _NO_PIPELINE,
    together: int = 1,
) -> list[Bins]:
    """Splits one global batch.

    Invariants: every index occurs exactly once; every rank has the same number of micro-batches; no pack exceeds
    ``capacity`` after alignment, but for a group that alone does, which is alone; a pack is empty only where there are fewer
    groups than packs; the same input gives the same plan. Within these, costs are level over packs and over ranks.

    Args:
        lengths: tokens of each sequence, at least 1.
        data_parallel: ranks.
        capacity: tokens a pack may hold.
        align: what the layout asks of lengths.
        micro_batches: packs on each rank; the fewest that best-fit decreasing finds when None.
        cost: cost of a sequence by its length, positive (see :func:`tulu_mega.layout.cost.sequence_flops`).
        multiple: what the number of micro-batches on a rank is to be a multiple of (interleaved pipelines ask for it).
        pipeline: decides the order of a rank's packs: that in which the schedule ends first.
        together: sequences in a group: so many that follow one another are never parted (2 for pairs).

    Returns:
        ``plan[rank][micro_batch]`` is the ascending list of indices into ``lengths``; without a pipeline a rank's costliest
        pack comes first.

    Raises:
        UserError: ``micro_batches`` cannot hold the batch or is no such multiple, or ``capacity`` is below the alignment.
    """
    lengths = [int(length) for length in lengths]
    if lengths and min(lengths) < 1:
        raise ValueError("a sequence of no tokens cannot be packed")
    padded = [align.padded_sequence(length) for length in lengths]
    groups = [padded[start : start + together] for start in range(0, len(padded), together)]
    sizes = [sum(group) for group in groups]
    costs = [sum(float(cost(size)) for size in group) for group in groups]
    plan = plan_groups(sizes, costs, data_parallel, capacity, align, micro_batches, multiple, pipeline)
    return plan if together == 1 else [[_members(pack, together) for pack in rank] for rank in plan]


def plan_groups(
    sizes: Sequence[int],
    costs: Sequence[float],
    data_parallel: int,
    capacity: int,
    align: Alignment,
    micro_batches: int | None = None,
    multiple: int = 1,
    pipeline: Pipeline = _NO_PIPELINE,
) -> list[Bins]:
    """:func:`plan_step` for groups of any make.

    Args:
        sizes: tokens of each group, aligned.
        costs: of each group, positive.
        The rest is plan_step's.

    Returns:
        As `plan_step`: ascending lists of indices into `sizes`.

    Raises:
        UserError: as `plan_step`.
    """
    if micro_batches and micro_batches % multiple:
        raise UserError(
            f"train.micro_batches = {micro_batches} is not a multiple of {multiple}, which this pipeline's schedule asks for; "
            f"set train.micro_batches to {-(-micro_batches // multiple) * multiple} or leave it out"
        )
    room = capacity // align.total * align.total
    if not room:
        raise UserError(
            f"a micro-batch may hold {capacity} tokens, but this layout aligns it to multiples of {align.total}; "
            f"set data.pack_length to {align.total} or more"
        )
    order = sorted(range(len(sizes)), key=lambda index: -sizes[index])
    each = micro_batches or _up(math.ceil(len(_best_fit(sizes, order, room)) / data_parallel), multiple)
    plan = _by_rank(sizes, costs, order, room, data_parallel, each)
    if plan is None:
        bins = _fill(sizes, costs, order, room, data_parallel * each)
        if bins is None:
            needed = _up(math.ceil(len(_best_fit(sizes, order, room)) / data_parallel), multiple)
            raise UserError(
                f"train.micro_batches = {micro_batches} cannot hold a batch of {sum(sizes)} tokens "
                f"on {data_parallel} data-parallel ranks at {capacity} tokens a micro-batch: "
                f"it takes {needed}; raise train.micro_batches or data.pack_length"
            )
        plan = _deal(bins, costs, data_parallel, each)
    return [_ordered(rank, costs, pipeline) for rank in plan]


def _members(pack: list[int], together: int) -> list[int]:
    return [group * together + place for group in pack for place in range(together)]


def _up(count: int, multiple: int) -> int:
    return max(1, -(-count // multiple)) * multiple


def _ordered(packs: Bins, costs: list[float], pipeline: Pipeline) -> Bins:
    packs = [sorted(members) for members in packs]
    order = shortest_order([sum(costs[index] for index in members) for members in packs], pipeline)
    return [packs[number] for number in order]


def _by_rank(sizes: list[int], costs: list[float], order: list[int], room: int, ranks: int, each: int) -> list[Bins] | None:
    """Share sequences out over ranks first, which levels ranks best; None where a rank's share does not fit into its bins."""
    shares = _least_cost([min(size, room) for size in sizes], costs, order, room * each, ranks)
    if shares is None or (len(order) >= ranks * each and min(map(len, shares)) < each):
        return None
    plan = []
    for share in shares:
        bins = _fill(sizes, costs, share, room, each)
        if bins is None:
            return None
        plan.append(bins)
    return plan


def _fill(sizes: list[int], costs: list[float], order: list[int], room: int, count: int) -> Bins | None:
    """Return `count` bins of about equal cost; None when they do not hold everything."""
    bins = _least_cost(sizes, costs, order, room, count)
    if bins is not None:
        return bins
    tight = _best_fit(sizes, order, room)
    if len(tight) > count:
        return None
    bins = _spread(tight, costs, count)
    _level(bins, sizes, costs, room)
    return bins


def _best_fit(sizes: list[int], order: list[int], room: int) -> Bins:
    """Few bins: longest first, each into the fullest bin that still takes it (11/9 of the fewest at worst)."""
    bins: Bins = []
    space: list[tuple[int, int]] = []
    for index in order:
        size = sizes[index]
        at = bisect_left(space, (size, -1))
        if at < len(space):
            left, chosen = space.pop(at)
            bins[chosen].append(index)
        else:
            left, chosen = room, len(bins)
            bins.append([index])
        insort(space, (left - size, chosen))  # an over-long sequence leaves less than nothing: its bin is closed
    return bins


def _least_cost(sizes: list[int], costs: list[float], order: list[int], room: int, count: int) -> Bins | None:
    """Level bins: longest first, each into the cheapest bin that still takes it; None when one fits nowhere."""
    bins: Bins = [[] for _ in range(count)]
    space = [room] * count
    heap = [(0.0, number) for number in range(count)]
    for index in order:
        size = sizes[index]
        passed = []
        while heap:
            total, number = heapq.heappop(heap)
            if size <= space[number] or not bins[number]:
                break
            passed.append((total, number))
        else:
            return None
        bins[number].append(index)
        space[number] -= size
        heapq.heappush(heap, (total + costs[index], number))
        for entry in passed:
            heapq.heappush(heap, entry)
    return bins


def _spread(tight: Bins, costs: list[float], count: int) -> Bins:
    """Return `count` bins: while there are fewer, the costliest that can be split gives its costliest sequence to a new one."""
    bins = [list(members) for members in tight]
    while len(bins) < count:
        several = [members for members in bins if len(members) > 1]
        if not several:
            bins += [[] for _ in range(count - len(bins))]
            break
        donor = max(several, key=lambda members: sum(costs[index] for index in members))
        moved = max(donor, key=lambda index: costs[index])
        donor.remove(moved)
        bins.append([moved])
    return bins


def _level(bins: Bins, sizes: list[int], costs: list[float], room: int) -> None:
    """Moves or exchanges sequences between the costliest and the cheapest bin, in place, while that narrows the gap."""
    totals = [sum(costs[index] for index in members) for members in bins]
    fill = [sum(sizes[index] for index in members) for members in bins]
    for _ in range(_EXCHANGES):
        high = max(range(len(bins)), key=totals.__getitem__)
        low = min(range(len(bins)), key=totals.__getitem__)
        gap = totals[high] - totals[low]
        best, choice = gap * (1 - 1e-9), None
        for give in bins[high] if len(bins[high]) > 1 else ():
            for take in (None, *bins[low]):
                flow = costs[give] - (costs[take] if take is not None else 0.0)
                tokens = sizes[give] - (sizes[take] if take is not None else 0)
                if tokens + fill[low] <= room and fill[high] - tokens <= room and abs(gap - 2 * flow) < best:
                    best, choice = abs(gap - 2 * flow), (give, take, flow, tokens)
        if choice is None:
            return
        give, take, flow, tokens = choice
        bins[high].remove(give)
        bins[low].append(give)
        if take is not None:
            bins[low].remove(take)
            bins[high].append(take)
        totals[high], totals[low] = totals[high] - flow, totals[low] + flow
        fill[high], fill[low] = fill[high] - tokens, fill[low] + tokens


def _deal(bins: Bins, costs: list[float], ranks: int, each: int) -> list[Bins]:
    """Deal bins to ranks: the costliest first, each to the rank with the least cost so far that has room."""
    totals = [sum(costs[index] for index in members) for members in bins]
    plan: list[Bins] = [[] for _ in range(ranks)]
    heap = [(0.0, rank) for rank in range(ranks)]
    for number in sorted(range(len(bins)), key=lambda number: -totals[number]):
        load, rank = heapq.heappop(heap)
        plan[rank].append(bins[number])
        if len(plan[rank]) < each:
            heapq.heappush(heap, (load + totals[number], rank))
    return plan
