"""What users log, cut to what a backend takes: short texts, flat attributes. The journal keeps it in full."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice
from typing import Any

from stepspan.events import Event
from stepspan.mapping.records import Scalar
from stepspan.values import shorten

MAX_TEXT_CHARS = 16 << 10
MAX_ATTRIBUTES = 128
"""Of a span or a log record, and values of a list; the SDK's default."""
ARTIFACT_FIELDS = ("name", "path", "kind", "step")


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Scalar | list[Scalar]]:
    """Nested mappings as flat attributes.

    Args:
        values: As the journal holds them.
        prefix: What each name begins with.

    Returns:
        At most `MAX_ATTRIBUTES`: those of a mapping have dotted names; numbers, texts and short lists of them stay,
        None is left out, everything else is text.

    """
    attributes: dict[str, Scalar | list[Scalar]] = {}
    if not values:
        return attributes
    for key, value in values.items():
        if len(attributes) >= MAX_ATTRIBUTES:
            break
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            attributes.update(flatten(value, f"{name}."))
        elif isinstance(value, str):
            attributes[name] = shorten(value, MAX_TEXT_CHARS)
        elif isinstance(value, (bool, int, float)):
            attributes[name] = value
        elif (
            isinstance(value, list)
            and len(value) <= MAX_ATTRIBUTES
            and all(isinstance(item, (str, int, float)) for item in value)
        ):
            attributes[name] = [shorten(item, MAX_TEXT_CHARS) if isinstance(item, str) else item for item in value]
        elif value is not None:
            attributes[name] = shorten(str(value), MAX_TEXT_CHARS)
    return dict(islice(attributes.items(), MAX_ATTRIBUTES))


def artifact_attributes(event: Event) -> dict[str, Any]:
    """The attributes of an artifact, as an event of the run's span and as a log record.

    Args:
        event: An `artifact` event.

    Returns:
        Name, path and kind, and the step if it has one.

    """
    return flatten({name: event[name] for name in ARTIFACT_FIELDS if name in event})


def event_attributes(event: Event) -> dict[str, Any]:
    """The attributes of a milestone, as an event of the run's span and as a log record.

    Args:
        event: An `event` event.

    Returns:
        The user's attributes, flat, and the status if it has one, which replaces a user's attribute of that name.

    """
    status = event.get("status")
    return {**flatten(event.get("attributes", {})), **({} if status is None else {"status": status})}


def exception_attributes(error: Mapping[str, Any]) -> dict[str, Any]:
    """The attributes of an exception, by OpenTelemetry's semantic conventions.

    Args:
        error: An `error` event, or the `exception` of a `log` event.

    Returns:
        The user's attributes, flat, and `exception.type`, `.message` and `.stacktrace`.

    """
    return {
        **flatten(error.get("attributes", {})),
        "exception.type": error["type"],
        "exception.message": shorten(error["message"], MAX_TEXT_CHARS),
        "exception.stacktrace": shorten(error["stack"], MAX_TEXT_CHARS),
    }
