"""What users hand over, as numbers and text: one function for each contract, named by what it returns.

Nothing here trusts the methods of the objects it is given, and nothing here raises, whatever an object's own `__str__`
or `__float__` does. Numbers that JSON has no word for are written as proto3 JSON does: "NaN", "Infinity", "-Infinity".
`stepspan.conversion` is for objects that hold others.
"""

from __future__ import annotations

import math
import operator
import traceback
from typing import Any

from stepspan.errors import short_repr

NONFINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
"""The numbers that JSON has no word for, by how they are written."""
MAX_STACK_CHARS = 64 << 10
MAX_ERROR_CHARS = 1000
"""Of an exception that a message quotes."""


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


def to_integer(value: Any) -> int:
    """The whole number in a value: an integer, or a float or an array of one element that is whole.

    Raises:
        Exception: There is none; whatever a user's object raises.

    """
    try:
        return operator.index(value)
    except TypeError:
        if isinstance(value, (str, bytes, bytearray)):
            raise
        number = float(value)
        if not number.is_integer():
            raise
        return int(number)


def to_text(value: Any) -> str:
    """Any object as text that UTF-8 can write: a lone surrogate becomes "?". Never raises."""
    return value if type(value) is str else str_of(value)


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
    return {"type": name, "message": str_of(error), "stack": str_of(stack)}


def str_of(value: Any) -> str:
    """The `str` of an object that is no plain text, or what says that it raises. Never raises."""
    try:
        return utf8(str(value)).decode()
    except Exception as error:  # a user's __str__ may do anything
        return f"<{type(value).__name__}: {type(error).__name__} in __str__>"
