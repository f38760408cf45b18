"""Nested mappings of metrics, flat: `{"f1": {"cat": 0.5}}` is `{"f1/cat": 0.5}`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from stepspan.values import error_text, to_text

SEPARATOR = "/"
MAX_DEPTH = 8
"""Of mappings within each other, the call's own included."""
MAX_METRICS = 100_000
"""Of one call that is flattened."""


class Flat(NamedTuple):
    """What one call logs.

    Attributes:
        values: Key -> value, which may be anything but a mapping.
        dropped: Key and reason of each value that is not among them.

    """

    values: dict[str, Any]
    dropped: list[tuple[str, str]]


def flatten(metrics: Mapping[Any, Any]) -> Flat:
    """The metrics of a call by flat keys.

    Args:
        metrics: Key -> value or mapping; keys of any kind.

    Raises:
        Exception: What iterating over `metrics` itself raises.

    """
    flat = Flat({}, [])
    _add(flat, metrics, "", (id(metrics),))
    return flat


def is_nested(value: Any) -> bool:
    """Whether a value is a mapping. Asks its class, so that no method of a user's runs."""
    return issubclass(type(value), Mapping)


def _add(flat: Flat, metrics: Mapping[Any, Any], prefix: str, parents: tuple[int, ...]) -> None:
    for key in metrics:
        name = f"{prefix}{to_text(key)}"
        if len(flat.values) + len(flat.dropped) >= MAX_METRICS:
            flat.dropped.append((name, f"more than {MAX_METRICS:,} metrics in one call"))
            return
        try:
            value = metrics[key]
            if is_nested(value):
                if id(value) in parents:
                    raise ValueError("it contains itself")
                if len(parents) >= MAX_DEPTH:
                    raise ValueError(f"nested more than {MAX_DEPTH} deep")
                _add(flat, value, f"{name}{SEPARATOR}", (*parents, id(value)))
                continue
        except Exception as error:  # a user's mapping may raise anything
            flat.dropped.append((name, error_text(error)))
            continue
        if name in flat.values:
            flat.dropped.append((name, "given twice in one call: the later one stays"))
        flat.values[name] = value
