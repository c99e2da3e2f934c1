"""Waiting together, where that takes minutes."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from tests.lib import world
from tulu_mega.distributed import collectives
from tulu_mega.errors import UserError

pytestmark = pytest.mark.ranks


def _shared(backend: str) -> tuple[list[str], int]:
    """What the ranks get from one that leads, in a world that calls itself so; groups that were made."""
    dist.init_process_group("cpu:gloo,cuda:gloo")
    own, made = dist.new_group, []
    dist.get_backend = lambda group=None: backend if group in (None, dist.group.WORLD) else "gloo"
    dist.new_group = lambda **options: made.append(options) or own(**options)
    crew = collectives.Crew({"say": lambda said: heard.append(said)})
    heard: list[str] = []
    for step in range(2):
        heard.append(crew.share(lambda step=step: crew.do("say", f"action {step}") or f"end {step}"))
    timeout = dist.group.WORLD._get_backend(torch.device("cuda")).options._timeout
    assert all(options == {"backend": "gloo", "timeout": timeout} for options in made)
    return heard, len(made)


def _failed() -> list[str]:
    """What a rank hears where the work fails on rank 0, an action on all, and the store of both."""
    dist.init_process_group("gloo")

    def refuse(said: str) -> None:
        raise UserError(f"{said} cannot be")

    crew = collectives.Crew({"refuse": refuse})
    heard = []
    for work in (lambda: refuse("the work"), lambda: crew.do("refuse", "an action")):
        try:
            crew.share(work)
        except UserError as error:
            heard.append(str(error))
    return [*heard, crew.share(lambda: "and on")]


def test_what_ends_the_first_rank_s_work_ends_all_ranks():
    assert world.run(2, _failed) == [["the work cannot be", "an action cannot be", "and on"]] * 2


@pytest.mark.parametrize(("backend", "groups"), [("gloo", 0), ("nccl", 1)])
def test_ranks_that_follow_wait_on_a_cpu(backend, groups):
    """In a group of gloo's that is made once where the world is NCCL's."""
    expected = ["action 0", "end 0", "action 1", "end 1"]
    assert world.run(2, _shared, backend) == [(expected, groups)] * 2
