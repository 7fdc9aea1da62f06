"""Plain data as one line of ASCII text: to carry it between processes, and to compare it.

Plain data is None, bool, int, float, complex, str, bytes, list, tuple, set, frozenset and dict, nested at
will. Decoding builds nothing else: no pickle, no eval, no names.

An instance of a subclass (Counter, defaultdict, IntEnum, a named tuple) is written as its plain part: what
the built-in type that it extends holds. That part is read with the built-in type's own methods, so nothing
that the subclass overrides is called. A class that only claims to be a subclass, by its `__class__`, is not
plain data.

Two values have the same `comparable` text if their plain parts are equal and of the same types throughout:
False is not 0, 1 is not 1.0, [1] is not (1,). Floats are compared to the last bit, but -0.0 is 0.0, and nan
is nan. The order of a dictionary's keys does not count.
"""

import json
import re
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Any

MAX_DEPTH = 200  # of nested containers: far below what takes the interpreter's stack
SURROGATE = re.compile("[\ud800-\udfff]")  # JSON would join two of them to one character
SMALL_INT = 10**15  # larger ones are written in hex: decimal is slow, and limited to 4,300 digits

# Built-in type -> the method that reads the plain part: a plain number, text or bytes, or the items.
PLAIN_PART: dict[type, Callable[[Any], Any]] = {
    int: int.__pos__, float: float.__pos__, complex: complex.__pos__,
    str: str.__str__, bytes: bytes.__bytes__,
    list: list.__iter__, tuple: tuple.__iter__, set: set.__iter__, frozenset: frozenset.__iter__,
    # It keeps an order of its own, which dict.items does not see. It must precede dict.
    OrderedDict: OrderedDict.items,
    dict: dict.items,
}  # fmt: skip


def encode(value: object) -> str:
    """The value's text, for `decode`. Dictionaries keep the order of their keys.

    TypeError: the value is not plain data. ValueError: it is nested too deeply, or contains itself.
    """
    return _text(_to_json(value, 0, sort_keys=False))


def comparable(value: object) -> str:
    """The text that equal values of equal types share: as `encode`, but with sorted keys."""
    return _text(_to_json(value, 0, sort_keys=True))


def decode(text: str) -> Any:
    """The value of a text that `encode` made. ValueError: any other text, whatever is in it."""
    try:
        return _from_json(json.loads(text), 0)
    except (TypeError, KeyError, AttributeError, RecursionError, OverflowError) as error:
        raise ValueError(f"not plain data ({type(error).__name__})") from None


def _text(value: object) -> str:
    return json.dumps(value, separators=(",", ":"))


def _to_json(value: object, depth: int, sort_keys: bool) -> object:
    if depth > MAX_DEPTH:
        raise ValueError(f"nested more than {MAX_DEPTH} deep")

    def inner(items: Iterable) -> list:
        return [_to_json(item, depth + 1, sort_keys) for item in items]

    kind = type(value)
    if value is None or kind is bool:
        return value
    if (
        kind not in PLAIN_PART
    ):  # issubclass of a built-in type reads the true bases, which nobody can override
        bases = (base for base in PLAIN_PART if issubclass(kind, base))
        kind = next(bases, kind)
    if kind not in PLAIN_PART:
        raise TypeError(f"{kind.__name__} is not plain data")
    plain = PLAIN_PART[kind](value)

    if kind is int:
        return plain if -SMALL_INT < plain < SMALL_INT else {"int": hex(plain)}
    if kind is str:
        return plain if not SURROGATE.search(plain) else {"str": plain.encode("utf-8", "surrogatepass").hex()}
    if kind is float:
        return {"float": (plain + 0.0).hex()}  # + 0.0: -0.0 becomes 0.0
    if kind is complex:
        return {"complex": [(plain.real + 0.0).hex(), (plain.imag + 0.0).hex()]}
    if kind is bytes:
        return {"bytes": plain.hex()}
    if kind is list:
        return inner(plain)
    if kind is tuple:
        return {"tuple": inner(plain)}
    if kind in (set, frozenset):
        return {kind.__name__: sorted(inner(plain), key=_text)}
    pairs = [inner(pair) for pair in plain]
    return {"dict": sorted(pairs, key=_text) if sort_keys else pairs}


def _from_json(value: Any, depth: int) -> Any:
    kind = type(value)
    if depth > MAX_DEPTH:
        raise ValueError(f"nested more than {MAX_DEPTH} deep")
    if value is None or kind in (bool, str, int):
        return value
    if kind is list:
        return [_from_json(item, depth + 1) for item in value]
    if kind is not dict or len(value) != 1:
        raise ValueError("not plain data")
    ((tag, content),) = value.items()
    if tag == "int":
        return int(content, 16)
    if tag == "float":
        return float.fromhex(content)
    if tag == "complex":
        real, imag = content
        return complex(float.fromhex(real), float.fromhex(imag))
    if tag == "bytes":
        return bytes.fromhex(content)
    if tag == "str":
        return bytes.fromhex(content).decode("utf-8", "surrogatepass")
    if tag == "dict":
        return {_from_json(key, depth + 1): _from_json(item, depth + 1) for key, item in content}
    container = {"tuple": tuple, "set": set, "frozenset": frozenset}[tag]
    return container(_from_json(item, depth + 1) for item in content)
