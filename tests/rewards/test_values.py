"""Values between a test and the judged program: what goes over comes back the same, and nothing else comes back."""

from __future__ import annotations

import collections
import datetime
import decimal
import fractions
import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tulu_mega.rewards.sandboxed.values import (
    MOST_BYTES,
    MOST_DEPTH,
    Decoder,
    Encoder,
    Malformed,
    Untold,
    fill,
    pack,
    tag_of,
    unpack,
)

Point = collections.namedtuple("Point", "x y")


def untold(value: object) -> list:
    raise Untold(type(value).__name__)


def refused(told: list) -> object:
    raise Malformed("no data")


def over(value: object) -> object:
    """The value at the other end: a message is JSON in between."""
    return Decoder(refused)(unpack(pack(["value", Encoder(untold)(value)])[4:])[1])


def same(one: object, other: object) -> bool:
    """Of one type, and equal, with the signs of zeros and nan for nan."""
    if type(one) is not type(other):
        return False
    if type(one) in (float, complex):
        return repr(one) == repr(other)
    if type(one) is decimal.Decimal:
        return one.as_tuple() == other.as_tuple()
    if isinstance(one, dict):
        return len(one) == len(other) and all(same(a, b) and same(one[a], other[b]) for a, b in zip(one, other, strict=True))
    if isinstance(one, list | tuple | collections.deque):
        return len(one) == len(other) and all(map(same, one, other))
    return (
        one == other and {type(each) for each in one} == {type(each) for each in other}
        if isinstance(one, set | frozenset)
        else one == other
    )


HASHED = (
    st.none() | st.booleans() | st.integers() | st.integers(-(1 << 200), 1 << 200) | st.text(max_size=5) | st.binary(max_size=5)
    | st.floats(allow_nan=False) | st.fractions() | st.decimals(allow_nan=False) | st.dates() | st.datetimes() | st.timedeltas()
    | st.builds(range, st.integers(-9, 9), st.integers(-9, 9), st.sampled_from((-2, 1, 3)))
    | st.frozensets(st.integers(), max_size=3)
)  # fmt: skip
SIMPLE = HASHED | st.floats() | st.complex_numbers() | st.binary(max_size=5).map(bytearray) | st.just(decimal.Decimal("sNaN"))
VALUES = st.recursive(
    SIMPLE,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.sets(HASHED, max_size=3)
        | st.dictionaries(HASHED, inner, max_size=3)
        | st.dictionaries(st.text(max_size=2), inner, max_size=3).map(collections.OrderedDict)
        | st.dictionaries(st.text(max_size=2), st.integers(), max_size=3).map(collections.Counter)
        | st.lists(inner, max_size=3).map(lambda parts: collections.deque(parts, maxlen=4))
    ),
    max_leaves=12,
)


@settings(max_examples=150, deadline=None)
@given(VALUES)
def test_every_value_that_is_told_comes_back_the_same(value):
    assert same(over(value), value)


def test_what_has_an_equal_of_another_type_keeps_its_own():
    for value in (True, 1, 1.0, 0, False, 0.0, -0.0, math.nan, math.inf, -math.inf, "1", b"1", (), [], {}, set(), frozenset()):
        assert same(over(value), value) and same(over([value]), [value])
    assert same(over({1: "a", "1": "b"}), {1: "a", "1": "b"}) and type(over(collections.defaultdict(list, {1: 2}))) is not dict
    assert over(collections.defaultdict(list, {1: 2})).default_factory is None
    named = over(Point(1, [2]))
    assert named == (1, [2]) and type(named).__name__ == "Point" and named._fields == ("x", "y") and type(named) is not Point


class Own(int):
    pass


class Liar(dict):
    def items(self):
        return [("x", 1)]


@pytest.mark.parametrize(
    "value",
    [Own(3), Liar(), object(), lambda: 3, iter([]), type, Exception("x"), memoryview(b"x"), collections.ChainMap(), fractions,
     datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC), Point(len, 2), datetime.time(1)],
)  # fmt: skip
def test_a_value_of_another_type_does_not_go_over(value):
    for within in (value, [value], {"a": value}, (1, value)):
        with pytest.raises(Untold):
            Encoder(untold)(within)


def nested(depth: int) -> list:
    value: list = []
    for _ in range(depth):
        value = [value]
    return value


def test_depth_and_size_are_bounded():
    assert same(over(nested(MOST_DEPTH)), nested(MOST_DEPTH))
    with pytest.raises(Untold, match="nested"):
        Encoder(untold)(nested(MOST_DEPTH + 1))
    told: list = ["l"]
    for _ in range(MOST_DEPTH + 5):
        told = ["l", told]
    with pytest.raises(Malformed):
        Decoder(refused)(told)
    endless: list = []
    endless.append(endless)
    with pytest.raises(Untold, match="nested"):
        Encoder(untold)(endless)
    assert len(pack(["value", "x" * (MOST_BYTES - 20)])) > MOST_BYTES - 20
    with pytest.raises(Untold, match="16 MiB"):
        pack(["value", "x" * MOST_BYTES])
    with pytest.raises(Malformed):
        unpack(b"[" * 100_000)


@pytest.mark.parametrize(
    "told",
    [
        ["no tag"], [], {}, [1], [None], ["i", 3], ["i", "x"], ["i"], ["n", "1"], ["n", []], ["r", 0], ["r", -1], ["r", "0"],
        ["b", "x"], ["b", 3], ["c", 1, 2], ["c", 1.0], ["R", 0, 1, 0], ["R", 0, 1.0, 1], ["F", 1, 0], ["F", 1.5, 2], ["E", "x"],
        ["E", 1.5], ["Y", "x"], ["Y", "2020-13-01"], ["T", 3], ["A", 1, 2], ["A", 1 << 70, 0, 0], ["A", 0.5, 0, 0],
        ["N", "P", ["l", "x"], 1, 2], ["N", 3, ["l"]], ["N", "P", ["l", "def"], 1], ["N", "P", ["l", "_x"], 1], ["N", "P"],
        ["#", ["l"]], ["#", None], ["d", 1], ["d", ["l"], 1], ["s", ["l"]], ["s", ["d"]], ["f", ["l"]], ["q"], ["q", -1],
        ["q", "3"], ["q", 1 << 70], ["B", "0"], ["O", 1], ["C", 1], ["D", 1], ["l", ["l", ["x"]]],
    ],
    ids=json.dumps,
)  # fmt: skip
def test_what_is_no_value_is_refused(told):
    with pytest.raises(Malformed):
        Decoder(refused)(told)


@settings(max_examples=150, deadline=None)
@given(
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers()
        | st.floats()
        | st.sampled_from("ldtsfqbBcRFEYTANCOD#rinx")
        | st.text(max_size=3),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=2), inner, max_size=2),
        max_leaves=15,
    )
)
def test_whatever_comes_is_a_value_of_a_known_type_or_malformed(told):
    try:
        value = Decoder(refused, keep=True)(told)
    except Malformed:
        return
    assert type(value).__module__ in ("builtins", "collections", "fractions", "decimal", "datetime") or type(value).__bases__ == (
        tuple,
    )


@settings(max_examples=50, deadline=None)
@given(st.lists(VALUES, max_size=4))
def test_changes_of_arguments_come_back_in_place(parts):
    """As the supervisor has it: containers are numbered as they go over, and filled anew from what comes back."""
    ours, kept = [1, {"a": [2]}], []
    told = Encoder(untold, keep=kept)(ours)
    theirs = Decoder(refused, known := [], keep=True)(json.loads(json.dumps(told)))
    assert theirs == ours and [tag_of(each) for each in known] == [tag_of(each) for each in kept] == ["l", "d", "l"]
    theirs[:] = parts
    numbers = {id(each): number for number, each in enumerate(known)}
    back = Encoder(untold, known=numbers)(theirs, inline=True)
    fill(kept[0], "l", Decoder(refused, known=kept).contents(json.loads(json.dumps(back))))
    assert same(ours, parts) and kept[0] is ours
