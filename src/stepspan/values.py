"""What users hand over, as JSON values: one function for each contract, named by what it returns.

Nothing here trusts the methods of the objects it is given: `to_text`, `to_float`, `error_text` and `error_fields`
never raise, whatever an object's own `__str__`, `__float__` or `__iter__` does; `json_value` raises only what iterating
over a container raises. Numbers that JSON has no word for are written as proto3 JSON does: "NaN", "Infinity",
"-Infinity".
"""

from __future__ import annotations

import math
import traceback
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from stepspan.errors import short_repr

NONFINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
"""The numbers that JSON has no word for, by how they are written."""
MAX_NESTING = 32
"""Levels of nesting that `json_value` keeps; what lies deeper becomes text."""
MAX_STACK_CHARS = 64 << 10
MAX_ERROR_CHARS = 1000
"""Of an exception that a message quotes."""


def json_value(value: Any, parents: tuple[int, ...] = ()) -> Any:
    """Any object as JSON.

    Args:
        value: None, booleans, numbers, text, mappings, lists, tuples and sets keep their form; an integer beyond 64
            bits and every other object become their `str`.
        parents: The ids of the containers that `value` lies in, for the recursion: a container inside itself, and one
            nested deeper than `MAX_NESTING`, becomes text.

    Returns:
        What `orjson` can write.

    """
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        return int(value) if -(1 << 63) <= value < 1 << 63 else str(value)
    if isinstance(value, float):
        return json_number(float(value))
    if len(parents) < MAX_NESTING and id(value) not in parents:
        if isinstance(value, Mapping):
            return {_str(key): json_value(item, (*parents, id(value))) for key, item in value.items()}
        if isinstance(value, (list, tuple, set, frozenset)):
            return [json_value(item, (*parents, id(value))) for item in value]
    return _str(value)


def json_number(value: float) -> float | str:
    """A float as JSON can hold it: itself, or "NaN", "Infinity" or "-Infinity"."""
    if value - value == 0.0:
        return value
    return "NaN" if value != value else "Infinity" if value > 0 else "-Infinity"


def to_float(value: Any) -> float | None:
    """The number in a value as a journal line holds it ("NaN" and "Infinity" included); None where there is none."""
    try:
        return float(value)
    except Exception:  # also what a user's __float__ raises
        return None


def to_text(value: Any) -> str:
    """Any object as text that UTF-8 can write: a lone surrogate becomes "?". Never raises."""
    if type(value) is str:
        return value
    try:
        return str(json_value(value))
    except Exception:  # iterating over a user's container may raise anything
        return _str(value)


def error_text(error: BaseException) -> str:
    """An exception for a message: its `repr`. Never raises, whatever the exception's own `__repr__` does."""
    return utf8(short_repr(error, MAX_ERROR_CHARS)).decode()


def utf8(text: str) -> bytes:
    """A text as UTF-8; a lone surrogate (of a file name, of a torn string) becomes "?" rather than an error."""
    return text.encode("utf-8", "replace")


def shorten(text: str, limit: int) -> str:
    """A text of at most about `limit` characters: its beginning and its end, with an ellipsis between them."""
    return text if len(text) <= limit else f"{text[: limit // 2]} … {text[-limit // 2 :]}"


def format_seconds(seconds: float) -> str:
    """A duration for a person: "20 µs", "12.3 ms", "4.56 s", "45.2 s", "3 min 20 s" or "2 h 5 min".

    Args:
        seconds: The duration in seconds, not negative.

    """
    if seconds < 1e-3:
        return f"{seconds * 1e6:.0f} µs"
    if seconds < 1:
        return f"{seconds * 1e3:.3g} ms" if seconds < 0.9995 else "1.00 s"
    if seconds < 120:
        return f"{seconds:.2f} s" if seconds < 10 else f"{seconds:.1f} s"
    rounded = int(seconds + 0.5)
    if rounded < 7200:
        return f"{rounded // 60} min {rounded % 60} s"
    return f"{rounded // 3600} h {rounded % 3600 // 60} min"


def error_fields(error: BaseException) -> dict[str, Any]:
    """An exception as the fields of an `error` event: `type`, `message` and `stack`."""
    try:
        stack = "".join(traceback.format_exception(type(error), error, error.__traceback__))
    except Exception as failure:  # an exception's own attributes may raise
        lines = traceback.format_tb(error.__traceback__) if isinstance(error, BaseException) else []
        stack = "".join([*lines, f"<no more of {type(error).__name__}: {to_text(failure)}>"])
    if len(stack) > MAX_STACK_CHARS:  # its end says what happened
        stack = f"…{stack[-MAX_STACK_CHARS:]}"
    kind = type(error)
    name = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
    return {"type": name, "message": json_value(error), "stack": json_value(stack)}


def fields_of(params: Any) -> Mapping[str, Any]:
    """The fields of a mapping, a dataclass, a namespace or any other object with attributes.

    Raises:
        TypeError: `params` has none.

    """
    if isinstance(params, Mapping):
        return params
    if is_dataclass(params):
        return {field.name: getattr(params, field.name) for field in fields(params)}
    attributes: dict[str, Any] = vars(params)
    return attributes


def _str(value: Any) -> str:
    try:
        return utf8(str(value)).decode()
    except Exception as error:  # a user's __str__ may do anything
        return f"<{type(value).__name__}: {type(error).__name__} in __str__>"
