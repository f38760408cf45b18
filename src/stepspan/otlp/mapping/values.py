"""What users log, in the measure of a backend: short texts, flat attributes. The journal keeps the whole."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stepspan.otlp.records import Scalar

LONGEST_TEXT = 16 << 10
MOST_ATTRIBUTES = 128
ARTIFACT = ("name", "path", "kind", "step")


def short(text: str) -> str:
    """A text that fits: its beginning and its end."""
    if len(text) <= LONGEST_TEXT:
        return text
    return f"{text[: LONGEST_TEXT // 2]} … {text[-LONGEST_TEXT // 2 :]}"


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Scalar | list[Scalar]]:
    """Nested mappings as dotted names; what is neither a number nor a text nor a list of them, as text."""
    found: dict[str, Scalar | list[Scalar]] = {}
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
    return found
