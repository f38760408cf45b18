"""Rows of JSON: the records of the four systems' files, read with their positions, and what their values are.

A file holds one JSON object per line, written by Python's `json` (bare NaN and Infinity included) or by orjson. Blank
lines are skipped. A last line without a newline that is not JSON was torn by a crash, or is still being written, and is
left out. Anything else that is no JSON object is a `RecordError` that names file and line.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stepspan.errors import RecordError, short_repr
from stepspan.values import NONFINITE, json_number, to_float

NS_PER_S, NS_PER_MS, NS_PER_US = 1_000_000_000, 1_000_000, 1_000
MAX_UNIX_S = float(1 << 63) / NS_PER_S
MAX_FIRST_ROW_BYTES = 1 << 20


def read_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of a file, one line at a time.

    Args:
        path: The file.

    Yields:
        The line's number, from 1, and its object.

    Raises:
        RecordError: A line is not a JSON object; `where` names file and line.
        OSError: The file cannot be read.

    """
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            row = parse_row(line, f"{path}, line {number}", may_be_torn=not line.endswith(b"\n"))
            if row is not None:
                yield number, row


def parse_row(line: bytes | str, where: str, *, may_be_torn: bool = False) -> dict[str, Any] | None:
    """The object of one line.

    Args:
        line: The line, with or without its newline.
        where: Its position, for the error.
        may_be_torn: Whether a line that is not JSON is left out, because its end may be missing.

    Returns:
        The object; None for a blank or a torn line.

    Raises:
        RecordError: The line is not a JSON object.

    """
    if not line.strip():
        return None
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        if may_be_torn and isinstance(error, (json.JSONDecodeError, UnicodeDecodeError)):
            return None
        raise RecordError(f"not JSON: {error}", where=where) from None
    if not isinstance(row, dict):
        raise RecordError(f"must be an object, not {short_repr(row)}", where=where)
    return row


def first_row(path: Path) -> dict[str, Any]:
    """The first row of a file, to guess what the file is; empty where there is none. Never raises."""
    try:
        if path.is_file():
            with open(path, "rb") as file:
                return parse_row(file.readline(MAX_FIRST_ROW_BYTES), str(path)) or {}
    except (OSError, RecordError):
        pass
    return {}


def read_json(path: Path, kind: type) -> Any:
    """What a JSON file holds, if it is of that kind; a missing or corrupt file counts as empty. Raises OSError."""
    try:
        found = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError, RecursionError):
        return kind()
    return found if isinstance(found, kind) else kind()


def unix_ns(seconds: Any) -> int | None:
    """Unix seconds as Unix nanoseconds, exactly what the double says; None for what is not a time."""
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not 0 < seconds < MAX_UNIX_S:
        return None
    fraction, integral = math.modf(seconds)
    return int(integral) * NS_PER_S + round(fraction * NS_PER_S)


def row_number(value: Any) -> float | str | None:
    """A number of a row as an event holds it; None for what is not one. "NaN" and "Infinity" are numbers."""
    if type(value) is float and value - value == 0.0:
        return value
    if isinstance(value, str):
        return value if value in NONFINITE else None
    number = to_float(value) if isinstance(value, (int, float)) else None
    return None if number is None else json_number(number)


def row_numbers(values: dict[Any, Any]) -> dict[Any, float | str]:
    """The numbers among the values of a row, as an event holds them; everything else is left out."""
    found = {key: row_number(value) for key, value in values.items()}
    return {key: number for key, number in found.items() if number is not None}


def row_index(value: Any) -> int | None:
    """A step, epoch or rank of a row: an integer from 0 to 2^63 - 1, 1.0 included; None for what is not one."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return value if type(value) is int and 0 <= value < 1 << 63 else None
