"""What users hand over, as the fields of an event: exceptions, texts, parameters. Nothing here trusts their methods."""

from __future__ import annotations

import traceback
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from stepspan.events import Event, plain

LONGEST_STACK = 64 << 10


def describe(error: BaseException) -> Event:
    """An exception as the fields of an error event."""
    try:
        stack = "".join(traceback.format_exception(type(error), error, error.__traceback__))
    except Exception as failure:  # an exception's own attributes may raise
        lines = traceback.format_tb(error.__traceback__) if isinstance(error, BaseException) else []
        stack = "".join([*lines, f"<no more of {type(error).__name__}: {text(failure)}>"])
    if len(stack) > LONGEST_STACK:  # its end says what happened
        stack = f"…{stack[-LONGEST_STACK:]}"
    kind = type(error)
    name = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
    return {"type": name, "message": plain(error), "stack": plain(stack)}


def text(value: Any) -> str:
    """Any object as text; its own `__str__` may raise."""
    return value if type(value) is str else str(plain(value))


def mapping_of(params: Any) -> Mapping[str, Any]:
    """The fields of a mapping, a dataclass, a namespace or any other object with attributes. TypeError."""
    if isinstance(params, Mapping):
        return params
    if is_dataclass(params):
        return {field.name: getattr(params, field.name) for field in fields(params)}
    attributes: dict[str, Any] = vars(params)
    return attributes
