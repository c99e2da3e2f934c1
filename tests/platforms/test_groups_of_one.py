"""A single rank's collectives on a CPU: nothing is sent where input and output are the same memory, and everything else is."""

from __future__ import annotations

from tests.lib import world


def called() -> list[bool]:
    """Whether the collective itself runs: in place, into other memory, in place on two ranks."""
    import os

    import torch
    import torch.distributed as dist

    from tulu_mega.platforms.cpu_speed.groups_of_one import unless_alone

    if not dist.is_initialized():
        dist.init_process_group("gloo")
    calls = []
    reduce = unless_alone(lambda output, given, **how: calls.append((output, how)))
    data = torch.ones(4)
    alone = [dist.new_group([rank]) for rank in range(dist.get_world_size())][int(os.environ["RANK"])]
    found = []
    for output, given, group, waits in (
        (data, data, alone, True),
        (data.clone(), data, alone, True),
        (data[:2], data, alone, True),
        (data, data, alone, False),
        (data, data, None, True),
    ):
        calls.clear()
        reduce(output, given, group=group, async_op=not waits)
        found.append(bool(calls))
    return found


def test_only_a_lonely_rank_in_place_is_spared():
    assert world.run(2, called) == [[False, True, True, True, True]] * 2
