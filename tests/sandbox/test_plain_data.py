"""Plain data: what is decoded is what was encoded; comparable texts are equal where values and types are."""

# ruff: noqa: E731  classes that lie in a word
import collections
import enum
import itertools
import math
import random

import pytest

from gspo.sandbox.plain_data import MAX_DEPTH, comparable, decode, encode


def random_value(rng: random.Random, depth: int = 0):
    """Small, so that equal values come up by chance."""
    kind = rng.randrange(8 if depth > 2 else 14)
    if kind < 8:
        return rng.choice([None, True, False, 0, 1, -1, 1.0, 0.0, -0.0, 1j, "", "1", "é\n", b"", b"1", 2**70])
    items = [random_value(rng, depth + 1) for _ in range(rng.randrange(3))]
    if kind in (8, 9):
        return items
    if kind in (10, 11):
        return tuple(items)
    hashable = [item for item in items if is_hashable(item)]
    return (
        {key: rng.choice(items) for key in hashable} if kind == 12 else rng.choice([set, frozenset])(hashable)
    )


def is_hashable(value) -> bool:
    return isinstance(value, collections.abc.Hashable) and (
        not isinstance(value, tuple) or all(is_hashable(item) for item in value)
    )


def strictly_equal(a, b) -> bool:
    if type(a) is not type(b):
        return False
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(strictly_equal, a, b))
    if isinstance(a, set | frozenset):
        return len(a) == len(b) and all(any(strictly_equal(x, y) for y in b) for x in a)
    if isinstance(a, dict):
        return len(a) == len(b) and all(
            any(strictly_equal(key, other) and strictly_equal(a[key], b[other]) for other in b) for key in a
        )
    return a == b


def test_random_values_round_trip_and_compare():
    rng = random.Random(0)
    values = [random_value(rng) for _ in range(700)]
    for value in values:
        assert strictly_equal(decode(encode(value)), value)
        assert "\n" not in encode(value) and encode(value).isascii()
    texts = [comparable(value) for value in values]
    equal = [(i, j) for i in range(len(values)) for j in range(i) if strictly_equal(values[i], values[j])]
    same = [(i, j) for i in range(len(values)) for j in range(i) if texts[i] == texts[j]]
    assert equal == same and len(equal) > 1000


def test_what_is_hard_to_write():
    for value in (10**5000, -(10**20), math.inf, -math.inf, "\ud800", {(1, "a"): [{}]}, [[]] * 3):
        assert decode(encode(value)) == value
    assert math.isnan(decode(encode(math.nan))) and comparable(math.nan) == comparable(-math.nan)
    assert comparable("\ud83d\ude00") != comparable("\U0001f600")
    assert decode(encode("\ud83d\ude00")) == "\ud83d\ude00"
    assert comparable(0.0) == comparable(-0.0) and comparable(0.1 + 0.2) != comparable(0.3)
    assert list(decode(encode({"b": 1, "a": 2}))) == ["b", "a"]


def named(value: str):
    """Instances of honest subclasses, by name; a function so that the table below reads as one."""
    moved = collections.OrderedDict(a=1, b=2)
    moved.move_to_end("a")
    return {
        "Counter": collections.Counter("aab"),
        "defaultdict": collections.defaultdict(list, {"x": [1]}),
        "OrderedDict": moved,
        "IntEnum": enum.IntEnum("Size", {"SMALL": 1}).SMALL,
        "StrEnum": enum.StrEnum("Colour", {"RED": "red"}).RED,
        "IntFlag": enum.IntFlag("Bits", {"A": 1, "B": 2})(3),
        "named tuple": collections.namedtuple("Point", "x y")(1, (True,)),
        "keys and items": {enum.IntEnum("Size", {"SMALL": 1}).SMALL: [collections.Counter("a")]},
    }[value]


@pytest.mark.parametrize("value, plain", [
    ("Counter", {"a": 2, "b": 1}), ("defaultdict", {"x": [1]}), ("OrderedDict", {"b": 2, "a": 1}),
    ("IntEnum", 1), ("StrEnum", "red"), ("IntFlag", 3), ("named tuple", (1, (True,))),
    ("keys and items", {1: [{"a": 1}]}),
])  # fmt: skip
def test_an_instance_of_a_subclass_counts_as_its_plain_part(value, plain):
    assert strictly_equal(decode(encode(named(value))), plain)
    assert encode(named(value)) == encode(plain)  # the order of the keys too
    assert comparable([named(value)]) == comparable([plain])


class Liar:
    """Everything that a comparison or a conversion could ask of an object, answered falsely."""

    __eq__ = __ge__ = __le__ = __contains__ = lambda self, *other: True
    __ne__ = lambda self, other: False
    __hash__ = __len__ = lambda self: 0
    __index__ = __int__ = __abs__ = __add__ = __radd__ = __pos__ = lambda self, *other: 42
    __float__ = lambda self: 42.0
    __complex__ = lambda self: 42j
    __str__ = __repr__ = __format__ = lambda self, *spec: "42"
    __bytes__ = lambda self: b"42"
    __iter__ = lambda self: itertools.repeat(42)  # whoever asks never ends
    __getitem__ = lambda self, key: 42
    keys = items = values = copy = hex = real = __iter__


def test_a_subclass_that_lies_counts_as_its_plain_part():
    plain = [7, 1.5, 2j, "x", b"x", [1], (1,), {1}, frozenset({1}), {"a": 1}]
    for value in plain:
        kind = type(value)
        liar = type(kind.__name__, (Liar, kind), {})(value)
        assert comparable(liar) == comparable(value) and comparable(liar) != comparable(kind())
        assert encode([liar]) == encode([value])
    unequal = type("int", (int,), {"__eq__": lambda self, other: False, "__hash__": lambda self: 0})
    assert comparable({unequal(1), unequal(1)}) != comparable({1})
    assert comparable({unequal(1): 0, unequal(1): 0}) != comparable({1: 0})


def test_what_only_claims_to_be_of_a_type_is_no_plain_data():
    class Meta(type):
        __eq__ = __instancecheck__ = __subclasscheck__ = lambda self, other: True
        __hash__ = lambda self: hash(int)
        __mro__ = (int, object)

    claims = [type("int", (Liar,), {"__class__": kind})() for kind in (int, str, list, dict)]
    for value in (*claims, Meta("int", (), {})(), Meta("int", (), {}), collections.UserDict(a=1)):
        for write in (comparable, encode):
            with pytest.raises(TypeError):
                write([value])


def test_what_is_no_plain_data():
    in_itself: list = []
    in_itself.append(in_itself)
    deep: list = []
    for _ in range(MAX_DEPTH + 1):
        deep = [deep]
    for value, error in (
        (object(), TypeError),
        (len, TypeError),
        (in_itself, ValueError),
        (deep, ValueError),
    ):
        with pytest.raises(error):
            encode(value)


@pytest.mark.parametrize("text", [
    "", "[", "NaN", "1.5", "{}", "9" * 5000, "[" * 100000, "[" * 300 + "]" * 300, '{"x":1}', '{"float":1}',
    '{"int":"zz"}', '{"int":7}', '{"bytes":"x"}', '{"tuple":5}', '{"float":"0x1p99999"}', '{"complex":[1]}',
    '{"set":[[1]]}', '{"set":{},"tuple":[]}', '{"dict":[[[],1]]}', '{"dict":[[1]]}',
])  # fmt: skip
def test_any_other_text_is_a_value_error(text):
    with pytest.raises(ValueError):
        decode(text)
