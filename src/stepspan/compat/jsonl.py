"""JSON lines as the log stores and callbacks write them and their readers take them.

Written as Python's `json` does, bare NaN included, because its readers read nothing else. What JSON has no word for
becomes a number where it is one (a numpy scalar, a 0-d tensor), and text otherwise: nothing is raised.
"""

from __future__ import annotations

import json
import math
import operator
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stepspan.events import NONFINITE
from stepspan.values import json_number, json_value

SECOND = 1_000_000_000
LATEST = float(1 << 63) / SECOND


def dumps(value: Any, indent: int | None = None) -> str:
    """Any object as JSON. The keys at the top are text."""
    try:
        text = json.dumps(value, indent=indent, default=_plain)
        text.encode()  # a lone surrogate is no UTF-8
        return text
    except Exception:  # a key that is no text, a circle, whatever a user's `__float__` raises
        value = {key: harmless(item) for key, item in value.items()} if isinstance(value, dict) else harmless(value)
        return json.dumps(value, indent=indent, default=str)


def harmless(value: Any) -> Any:
    """Any object as plain data, whatever its own methods do."""
    try:
        return json_value(value)
    except Exception:  # a user's mapping may raise anything
        return f"<{type(value).__name__}>"


def scalar(value: Any) -> float | None:
    """A number, or an array without dimensions, as a float; None for all else, bool and text included."""
    try:
        if isinstance(value, (bool, str, bytes)) or tuple(getattr(value, "shape", ())):
            return None
        return float(value)
    except Exception:  # no number, or a user's `__float__`
        return None


def rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, object) of each line that is not blank.

    A last line without a newline that is no JSON was torn by a crash, and is passed over. Raises ValueError naming
    file and line for any other line that is no JSON object; OSError.
    """
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                if not line.endswith(b"\n"):
                    return
                raise ValueError(f"{path}, line {number}: not JSON: {error}") from None
            if not isinstance(row, dict):
                raise ValueError(f"{path}, line {number}: not a JSON object")
            yield number, row


def first_row(path: Path) -> dict[str, Any]:
    """The first row of a file, for a guess at what it is; empty where there is none. Never raises."""
    try:
        if path.is_file():
            with open(path, "rb") as file:
                row = json.loads(file.readline(1 << 20))
            return row if isinstance(row, dict) else {}
    except (OSError, ValueError, RecursionError):
        pass
    return {}


def content(path: Path, kind: type) -> Any:
    """What a JSON file holds, if it is of that kind; missing or corrupt it counts as empty. Raises OSError."""
    try:
        found = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError, RecursionError):
        return kind()
    return found if isinstance(found, kind) else kind()


def nanoseconds(seconds: Any) -> int | None:
    """Unix seconds as Unix ns, exactly what the double says; None for what is no time."""
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not 0 < seconds < LATEST:
        return None
    fraction, whole = math.modf(seconds)
    return int(whole) * SECOND + round(fraction * SECOND)


def number(value: Any) -> float | str | None:
    """A number of a row as an event holds it; None for what is none. "NaN" and "Infinity" are numbers."""
    if isinstance(value, str):
        return value if value in NONFINITE else None
    try:
        return json_number(float(value)) if isinstance(value, (bool, int, float)) else None
    except OverflowError:
        return None


def whole(value: Any) -> int | None:
    """A step or epoch of a row; None for what is none."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return value if type(value) is int and 0 <= value < 1 << 63 else None


def _plain(value: Any) -> Any:
    try:
        return operator.index(value)
    except Exception:  # no whole number
        found = scalar(value)
        return harmless(value) if found is None else found
