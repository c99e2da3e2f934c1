"""A worker's ledger of an update: what must come, what came, and what is wrong with it."""

from __future__ import annotations

import pytest

from tulu_mega.weight_transfer.ledger import Ledger
from tulu_mega.weight_transfer.protocol import Bucket, Expected, Place

MANIFEST = {
    "embed": Expected((5, 4), "float32", 0),
    "layer": Expected((4, 4), "bfloat16", 0),
    "head": Expected((5, 4), "float32", 1),
}


def ledger() -> Ledger:
    return Ledger(worker=2, version=5, manifest=MANIFEST)


def whole(sender: int) -> Bucket:
    if sender == 1:
        return Bucket(1, 0, (Place("head", 0, 80),))
    return Bucket(0, 0, (Place("embed", 0, 80), Place("layer", 128, 32)))


def take(kept: Ledger, bucket: Bucket) -> None:
    assert kept.check(5, bucket, 1024), kept.problems
    for place in bucket.places:
        kept.arrived(place.name, f"hash of {place.name}")


SENT = {name: f"hash of {name}" for name in MANIFEST}


def test_a_whole_update_has_no_problems():
    kept = ledger()
    take(kept, whole(0))
    take(kept, whole(1))
    kept.compare(5, SENT)
    assert kept.problems == []
    assert kept.nbytes == 80 + 32 + 80


WRONG = {
    "unknown": (Bucket(0, 0, (Place("nobody", 0, 80),)), "nobody from trainer rank 0 is not in the manifest"),
    "twice": (whole(0), "embed from trainer rank 0 came a second time"),
    "twice in a bucket": (Bucket(1, 0, (Place("head", 0, 80), Place("head", 128, 80))), "head from trainer rank 1 came a second"),
    "of another": (Bucket(0, 0, (Place("head", 0, 80),)), "head from trainer rank 0 is for trainer rank 1 to send"),
    "size": (Bucket(1, 0, (Place("head", 0, 76),)), "head from trainer rank 1 has 76 bytes, expected 80 for [5, 4] of float32"),
    "outside": (Bucket(1, 0, (Place("head", 1000, 80),)), "head from trainer rank 1 lies outside the buffer of 1024 bytes"),
}


@pytest.mark.parametrize(("bucket", "told"), WRONG.values(), ids=WRONG)
def test_a_wrong_bucket_is_refused_by_name(bucket, told):
    kept = ledger()
    take(kept, whole(0))
    assert not kept.check(5, bucket, 1024)
    assert any(problem.startswith(f"worker 2: update 5: {told}") for problem in kept.problems), kept.problems


def test_a_bucket_of_another_update_is_refused():
    kept = ledger()
    assert not kept.check(4, whole(0), 1024)
    assert kept.problems == ["worker 2: update 5: a bucket from trainer rank 0 is of update 4"]


def test_what_is_missing_or_changed_is_refused_by_name():
    kept = ledger()
    take(kept, whole(0))
    kept.compare(5, SENT | {"embed": "another"})
    assert kept.problems == [
        "worker 2: update 5: embed from trainer rank 0 arrived with checksum hash of embed, was sent with another",
        "worker 2: update 5: head from trainer rank 1 did not come",
    ]
    kept = ledger()
    take(kept, whole(0))
    take(kept, whole(1))
    kept.compare(6, {"embed": SENT["embed"], "layer": SENT["layer"], "stranger": "x"})
    assert kept.problems == [
        "worker 2: update 5: the commit is of update 6",
        "worker 2: update 5: head from trainer rank 1 came, but its sender gave no checksum",
        "worker 2: update 5: stranger: has a checksum, but is not in the manifest",
    ]
