"""Buckets, messages and checksums: what both ends of weight transfer have in common."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tulu_mega.weight_transfer.protocol import (
    ALIGNMENT,
    SLOTS,
    Bucket,
    Expected,
    Place,
    _device_checksum,
    begin_message,
    bucket_message,
    checksum,
    plan_buckets,
    read_begin,
    read_bucket,
    view,
)

MANIFEST = {
    "embed": Expected((5, 4), "float32", 0),
    "layer": Expected((4, 4), "bfloat16", 0),
    "head": Expected((5, 4), "float32", 1),
}


@given(
    st.lists(st.integers(1, 300), min_size=1, max_size=30),
    st.integers(1, 2000),
)
def test_buckets_hold_everything_once_without_overlap(rows, limit):
    manifest = {f"t{i}": Expected((n, 3), "float32", 7) for i, n in enumerate(rows)}
    buckets = plan_buckets(7, manifest, manifest, limit)
    assert [place.name for bucket in buckets for place in bucket.places] == list(manifest)
    assert [bucket.slot for bucket in buckets] == [i % SLOTS for i in range(len(buckets))]
    for bucket in buckets:
        assert len(bucket.places) == 1 or bucket.nbytes <= limit
        end = 0
        for place in bucket.places:
            assert place.offset >= end
            assert place.offset % ALIGNMENT == 0
            assert place.nbytes == manifest[place.name].nbytes
            end = place.offset + place.nbytes


def test_messages_survive_json():
    bucket = Bucket(3, 1, (Place("embed", 0, 80), Place("layer", 128, 32)))
    version, read = read_bucket(json.loads(json.dumps(bucket_message(9, bucket)))["bucket"])
    assert (version, read) == (9, bucket)
    assert read_begin(json.loads(json.dumps(begin_message(9, MANIFEST, True)))["begin"]) == (9, True, MANIFEST, {}, "")
    told = begin_message(9, MANIFEST, False, {"r": 3}, "word")
    assert read_begin(json.loads(json.dumps(told))["begin"]) == (9, False, MANIFEST, {"r": 3}, "word")


def _on_device(data: torch.Tensor) -> str:
    """As on a GPU, where it is the same arithmetic."""
    return _device_checksum(data.reshape(-1).view(torch.uint8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("of", [checksum, _on_device], ids=["cpu", "device"])
def test_a_checksum_is_of_the_bytes_alone_and_sees_each_of_them(of, dtype):
    torch.manual_seed(0)
    data = torch.randn(37, 11).to(dtype)
    buffer = torch.zeros(4096, dtype=torch.uint8)
    place = Place("t", 64, data.nbytes)
    placed = view(buffer, place, Expected((37, 11), str(dtype).removeprefix("torch."), 0))
    placed.copy_(data)
    assert of(placed) == of(data)
    seen = {of(data)}
    for at in (0, 1, 2, 3, 401, data.nbytes - 1):
        buffer[64 + at] ^= 16
        seen.add(of(placed))
        buffer[64 + at] ^= 16
    assert len(seen) == 7
    swapped = data.clone()
    swapped[[3, 4]] = data[[4, 3]]
    assert of(swapped) not in seen
    assert of(torch.zeros(8)) != of(torch.zeros(9))
