"""Responses to mini-batches: whole groups, nobody lost, differences by response."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from tulu_mega.data.batch import by_token, pack
from tulu_mega.layout.alignment import Alignment
from tulu_mega.records import IGNORE, Response
from tulu_mega.rl.batches import TrainedResponse, differences, split


def response(number, prompt=2, length=3):
    made = Response.of_one_turn([1] * prompt, [5 + number] * length, [-0.5] * length, [0] * length, "stop")
    return TrainedResponse(number, made, 0.25)


@given(st.lists(st.integers(1, 4), min_size=1, max_size=12), st.integers(1, 8))
def test_groups_stay_whole_in_order_and_level(sizes, parts):
    numbers = iter(range(sum(sizes)))
    groups = [[response(next(numbers)) for _ in range(size)] for size in sizes]
    made = split(groups, parts)
    assert [one.number for part in made for one in part] == list(range(sum(sizes)))
    assert len(made) == min(parts, len(groups)) and all(made)
    cuts = {group[0].number for group in groups}
    assert all(part[0].number in cuts for part in made)
    counts = [sum(group[0].number in {one.number for one in part} for group in groups) for part in made]
    assert max(counts) - min(counts) <= 1


def test_only_the_response_is_trained():
    sequence = response(4, prompt=3, length=2).sequence
    assert sequence.row == 4 and sequence.input_ids == [1, 1, 1, 9, 9] and sequence.labels == [IGNORE] * 3 + [9, 9]


def test_differences_by_response():
    responses = [response(3, length=4), response(0, length=1)]
    batch = pack([one.sequence for one in responses], Alignment(sequence=4, total=16))
    sampler = by_token(batch, {3: [-1.0, -2.0, -3.0, -4.0], 0: [-5.0]})
    old = by_token(batch, {3: [-1.0, -2.5, -3.0, -4.0], 0: [-5.25]})
    batch = batch.with_columns(sampler_logp_T=sampler, old_logp_T=old)
    found = differences([batch])
    assert {number: one[:2] for number, one in found.items()} == {3: (0.125, 0.5), 0: (0.25, 0.25)}
    assert torch.equal(old[~batch.loss_mask_T], torch.zeros(int((~batch.loss_mask_T).sum())))
