"""A record: cloudmesh's own fields, and those that stepspan adds.

    {"timestamp": "2025-10-09T08:53:20.123456+00:00", "command": "train", "status": "completed",
     "metrics": {"accuracy": 0.92}, "message": "…",
     "system": {"cpu": …, "gpu_present": …, "gpu_model": …, "memory_total": …, …},
     "event": "model_load_end", "attributes": {…}, "span": "9f0c…", "user": {"name": …, "script": …},
     "job_id": "…", "rank": 0, "local_rank": 0, "world_size": 1}

cloudmesh writes the first six, its timestamp in local time without a zone; there is no `message` where there is none.
`span` is what a "started" has in common with its "completed" or "failed". `status`, `message`, `event`, `attributes`
and `span` are left out where there is nothing to say. "NaN" and "Infinity" are written as in proto3 JSON.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import datetime, timedelta, timezone
from typing import Any

from stepspan.compat.rows import NS_PER_US, row_number, row_numbers, unix_ns
from stepspan.conversion import json_value
from stepspan.errors import RecordError, short_repr
from stepspan.values import json_number, to_float

Record = dict[str, Any]

STARTED = frozenset({"started"})
FAILED = frozenset({"failed", "failure", "error"})
ENDED = FAILED | {"completed", "interrupted"}
EDGE = re.compile(r"[_\-. :](?:start(?:ed)?|begin|end(?:ed)?|stop(?:ped)?|completed?|finish(?:ed)?|done|fail(?:ed)?)\Z")
"""The end of an event's name that says which end of a span it is."""
EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)
MICROSECOND = timedelta(microseconds=1)
INT64_LIMIT = 1 << 63


def timestamp(ns: int) -> str:
    """Unix ns as ISO 8601 in UTC, to the microsecond; texts sort as times do."""
    return (EPOCH + ns // NS_PER_US * MICROSECOND).isoformat(timespec="microseconds")


def instant(value: Any) -> int | None:
    """A timestamp as Unix ns: ISO 8601 (local time where it names no zone), or Unix seconds; None for None.

    Raises RecordError for what is not a time, or not one that 63 bits of nanoseconds can hold.
    """
    if value is None:
        return None
    if isinstance(value, str):
        try:
            time = datetime.fromisoformat(f"{value[:-1]}+00:00" if value.endswith(("Z", "z")) else value)
            ns = (time.astimezone(timezone.utc) - EPOCH) // MICROSECOND * NS_PER_US
        except (ValueError, OverflowError, OSError) as error:
            raise RecordError(f"timestamp={short_repr(value)} is not a time: {error}", "timestamp") from None
    else:
        seconds = unix_ns(value)
        ns = -1 if seconds is None else seconds
    if not 0 <= ns < INT64_LIMIT:
        raise RecordError(f"timestamp={short_repr(value)} is not a time: give ISO 8601 or Unix seconds", "timestamp")
    return ns


def measured(value: Any) -> bool | int | float | str | None:
    """A number as JSON can hold it, from whatever has `__float__` (numpy scalars, tensors); None for other values."""
    if isinstance(value, bool):
        return value
    if type(value) is int and -INT64_LIMIT <= value < INT64_LIMIT:
        return value
    if isinstance(value, (str, bytes)) or value is None:
        return None
    number = to_float(value)
    return None if number is None else json_number(number)


def unfolded(metrics: Mapping[Any, Any]) -> dict[Any, Any]:
    """Metrics by name: cloudmesh also writes a single one as `{"metric": name, "value": number}`."""
    found = dict(metrics)
    if "value" in found and isinstance(found.get("metric"), str):
        name = found.pop("metric")
        found[name] = found.pop("value")
    return found


def numbers(record: Mapping[str, Any]) -> dict[str, float | str]:
    """The points of a record: metric -> number as a journal's event holds it."""
    return row_numbers(unfolded(record.get("metrics") or {}))


def milestone(record: Mapping[str, Any]) -> tuple[str, str | None, dict[str, Any]] | None:
    """The event that a record reports in addition to its numbers: name, status, attributes; None where there is none.

    The name is the event's, or else the command's. Texts among the metrics are attributes.
    """
    texts = {key: value for key, value in unfolded(record.get("metrics") or {}).items() if row_number(value) is None}
    attributes = {**texts, **(record.get("attributes") or {})}
    if record.get("message") is not None:
        attributes["message"] = record["message"]
    event, status, command = record.get("event"), record.get("status"), record.get("command")
    if event is None and status is None and not attributes:
        return None
    if command is not None:
        attributes["command"] = command
    name = str(event or command or "telemetry")
    return name, None if status is None else str(status), json_value(attributes)


def span_name(record: Mapping[str, Any]) -> str:
    """The span that a record begins or ends: "model_load" of "model_load_start", or else the command."""
    event = record.get("event")
    return (EDGE.sub("", str(event)) or str(event)) if event else str(record.get("command") or "telemetry")


def edge(record: Mapping[str, Any]) -> str | None:
    """Whether a record's status is that of a span's "begin" or "end"; None for neither."""
    status = str(record.get("status")).lower()
    return "begin" if status in STARTED else "end" if status in ENDED else None


def has_failed(record: Mapping[str, Any]) -> bool:
    """Whether a record's status is that of a failure."""
    return str(record.get("status")).lower() in FAILED
