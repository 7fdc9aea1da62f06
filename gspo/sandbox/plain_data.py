"""Plain data as one line of ASCII text: to carry it between processes, and to compare it.

Plain data is None, bool, int, float, complex, str, bytes, list, tuple, set, frozenset and dict, nested at
will. Decoding builds nothing else: no pickle, no eval, no names.

Two values have the same `comparable` text if they are equal and of the same types throughout: False is not 0,
1 is not 1.0, [1] is not (1,), and nothing of a subclass is comparable. Floats are compared to the last bit,
but -0.0 is 0.0, and nan is nan. The order of a dictionary's keys does not count.
"""

import json
import re

MAX_DEPTH = 200  # of nested containers: far below what takes the interpreter's stack
SURROGATE = re.compile("[\ud800-\udfff]")  # JSON would join two of them to one character
PLAIN = (bool, int, float, complex, str, bytes, list, tuple, set, frozenset, dict)
SMALL_INT = 10**15  # larger ones are written in hex: decimal is slow, and limited to 4,300 digits


def encode(value) -> str:
    """The value's text, for `decode`. Of a subclass (a Counter, a named tuple), the plain part.

    TypeError: it is not plain data. ValueError: it is nested too deeply, or in itself.
    """
    return _text(_to_json(value, 0, strict=False))


def comparable(value) -> str:
    """The text that equal values of equal types share. TypeError, ValueError: as encode."""
    return _text(_to_json(value, 0, strict=True))


def decode(text: str):
    """The value of a text that `encode` made. ValueError: any other text, whatever is in it."""
    try:
        return _from_json(json.loads(text), 0)
    except (TypeError, KeyError, AttributeError, RecursionError, OverflowError) as error:
        raise ValueError(f"not plain data ({type(error).__name__})") from None


def _text(value) -> str:
    return json.dumps(value, separators=(",", ":"))


def _to_json(value, depth: int, strict: bool):
    if depth > MAX_DEPTH:
        raise ValueError(f"nested more than {MAX_DEPTH} deep")

    def inner(items) -> list:
        return [_to_json(item, depth + 1, strict) for item in items]

    kind = type(value)
    if kind not in PLAIN and not strict:
        kind = next((plain for plain in PLAIN if isinstance(value, plain)), kind)
        if kind in PLAIN:
            value = str.__str__(value) if kind is str else kind(value)
    if value is None or kind is bool:
        return value
    if kind is str:
        return value if not SURROGATE.search(value) else {"str": value.encode("utf-8", "surrogatepass").hex()}
    if kind is int:
        return value if -SMALL_INT < value < SMALL_INT else {"int": hex(value)}
    if kind is float:
        return {"float": (value + 0.0).hex()}
    if kind is complex:
        return {"complex": [(value.real + 0.0).hex(), (value.imag + 0.0).hex()]}
    if kind is bytes:
        return {"bytes": value.hex()}
    if kind is list:
        return inner(value)
    if kind is tuple:
        return {"tuple": inner(value)}
    if kind in (set, frozenset):
        return {kind.__name__: sorted(inner(value), key=_text)}
    if kind is dict:
        pairs = [[key, item] for key, item in zip(inner(value.keys()), inner(value.values()), strict=True)]
        return {"dict": sorted(pairs, key=_text) if strict else pairs}
    raise TypeError(f"{kind.__name__} is not plain data")


def _from_json(value, depth: int):
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
