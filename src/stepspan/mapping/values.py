"""What users log, in the measure of a backend: short texts, flat attributes. The journal keeps the whole."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import lru_cache
from itertools import islice
from typing import Any

from stepspan.mapping.records import Scalar

log = logging.getLogger("stepspan.mapping")

LONGEST_TEXT = 16 << 10
MOST_ATTRIBUTES = 128
ARTIFACT = ("name", "path", "kind", "step")
MALFORMED = (AttributeError, KeyError, TypeError, ValueError)
"""What an event raises that somebody's processor has bent out of shape: it costs that event, not the session."""


@lru_cache(maxsize=256)
def warn_unmappable(tag: str, why: str) -> None:
    """Say it once."""
    log.warning("a %s event could not be mapped: %s (told once)", tag, why)


def number(value: Any) -> float | None:
    """A number as the journal holds it, "NaN" and "Infinity" included; None for what is none."""
    try:
        return float(value)
    except (OverflowError, TypeError, ValueError):
        return None


def short(text: str) -> str:
    """A text that fits: its beginning and its end."""
    if len(text) <= LONGEST_TEXT:
        return text
    return f"{text[: LONGEST_TEXT // 2]} … {text[-LONGEST_TEXT // 2 :]}"


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Scalar | list[Scalar]]:
    """Nested mappings as dotted names; what is neither a number nor a text nor a list of them, as text."""
    found: dict[str, Scalar | list[Scalar]] = {}
    if not values:
        return found
    for key, value in values.items():
        if len(found) >= MOST_ATTRIBUTES:
            break
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            found.update(flat(value, f"{name}."))
        elif isinstance(value, str):
            found[name] = short(value)
        elif isinstance(value, (bool, int, float)):
            found[name] = value
        elif (
            isinstance(value, list)
            and len(value) <= MOST_ATTRIBUTES
            and all(isinstance(v, (str, int, float)) for v in value)
        ):
            found[name] = [short(item) if isinstance(item, str) else item for item in value]
        elif value is not None:
            found[name] = short(str(value))
    return dict(islice(found.items(), MOST_ATTRIBUTES))
