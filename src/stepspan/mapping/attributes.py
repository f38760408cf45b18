"""What users log, cut to what a backend takes: short texts, flat attributes. The journal keeps it in full."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import orjson

from stepspan.events import Event
from stepspan.mapping.records import Scalar
from stepspan.values import shorten

MAX_TEXT_CHARS = 16 << 10
MAX_ATTRIBUTES = 128
"""Of a span or a log record, and values of a list; the SDK's default."""
MAX_JSON_VALUE_CHARS = 1000
"""Of a value within a text that is too long as a whole."""
ARTIFACT_FIELDS = ("name", "path", "kind", "step")


class Flat(NamedTuple):
    """Flat attributes, and how many more there were."""

    attributes: dict[str, Scalar | list[Scalar]]
    dropped: int


def flatten(values: Mapping[str, Any], *, cut: int = 0, limit: int = MAX_ATTRIBUTES) -> Flat:
    """Nested mappings as flat attributes.

    Args:
        values: As the journal holds them.
        cut: How many the journal itself could not hold.
        limit: How many are kept.

    Returns:
        At most `limit`: those of a mapping have dotted names; numbers, texts and short lists of them stay,
        None is left out, everything else is text.

    """
    attributes: dict[str, Scalar | list[Scalar]] = {}
    dropped = cut
    for name, value in leaves(values):
        if len(attributes) < limit or name in attributes:
            attributes[name] = attribute_value(value)
        else:
            dropped += 1
    return Flat(attributes, dropped)


def leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The values of nested mappings by dotted names; what is None is left out.

    Args:
        values: As the journal holds them.
        prefix: What each name begins with.

    """
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{prefix}{key}.")
        elif value is not None:
            yield f"{prefix}{key}", value


def attribute_value(value: Any) -> Scalar | list[Scalar]:
    """A value that is no mapping as a backend takes it: short texts, numbers, and short lists of these."""
    if isinstance(value, str):
        return shorten(value, MAX_TEXT_CHARS)
    if isinstance(value, (bool, int, float)):
        return value
    if (
        isinstance(value, list)
        and len(value) <= MAX_ATTRIBUTES
        and all(isinstance(item, (str, int, float)) for item in value)
    ):
        return [shorten(item, MAX_TEXT_CHARS) if isinstance(item, str) else item for item in value]
    return shorten(str(value), MAX_TEXT_CHARS)


def json_text(values: Mapping[str, Any]) -> str:
    """A mapping as JSON of at most `MAX_TEXT_CHARS`, for a log record's body.

    What does not fit is shortened as text, and then left out, and counted as `...`: the text stays JSON.
    """
    text = orjson.dumps(values).decode()
    if len(text) <= MAX_TEXT_CHARS:
        return text
    left = MAX_TEXT_CHARS - len('{"...":"1000000 more"}')
    entries: list[str] = []
    for key, value in values.items():
        name = orjson.dumps(shorten(key, MAX_JSON_VALUE_CHARS)).decode()
        written = orjson.dumps(value).decode()
        if len(written) > MAX_JSON_VALUE_CHARS:
            written = orjson.dumps(shorten(value if isinstance(value, str) else written, MAX_JSON_VALUE_CHARS)).decode()
        left -= len(name) + len(written) + 2
        if left < 0:
            break
        entries.append(f"{name}:{written}")
    if len(entries) < len(values):
        entries.append(f'"...":"{len(values) - len(entries)} more"')
    return f"{{{','.join(entries)}}}"


def artifact_attributes(event: Event) -> dict[str, Any]:
    """The attributes of an artifact, as an event of the run's span and as a log record.

    Args:
        event: An `artifact` event.

    Returns:
        Name, path and kind, and the step if it has one.

    """
    return flatten({name: event[name] for name in ARTIFACT_FIELDS if name in event}).attributes


def event_attributes(event: Event, limit: int = MAX_ATTRIBUTES) -> Flat:
    """The attributes of a milestone, as an event of the run's span and as a log record.

    Args:
        event: An `event` event.
        limit: How many of the user's are kept.

    Returns:
        The user's attributes, flat, and the status if it has one, which replaces a user's attribute of that name.

    """
    flat = flatten(event.get("attributes", {}), cut=event.get("cut", 0), limit=limit)
    status = event.get("status")
    if status is not None:
        flat.attributes["status"] = status
    return flat


def exception_attributes(error: Mapping[str, Any], limit: int = MAX_ATTRIBUTES) -> Flat:
    """The attributes of an exception, by OpenTelemetry's semantic conventions.

    Args:
        error: An `error` event, or the `exception` of a `log` event.
        limit: How many of the user's are kept.

    Returns:
        The user's attributes, flat, and `exception.type`, `.message` and `.stacktrace`.

    """
    flat = flatten(error.get("attributes", {}), cut=error.get("cut", 0), limit=limit)
    flat.attributes["exception.type"] = error["type"]
    flat.attributes["exception.message"] = shorten(error["message"], MAX_TEXT_CHARS)
    flat.attributes["exception.stacktrace"] = shorten(error["stack"], MAX_TEXT_CHARS)
    return flat
