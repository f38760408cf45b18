"""A record, in words: cloudmesh's own fields, and those that stepspan adds.

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

from stepspan.compat.jsonl import nanoseconds, number
from stepspan.values import json_number, json_value

Record = dict[str, Any]

STARTED = frozenset({"started"})
FAILED = frozenset({"failed", "failure", "error"})
ENDED = FAILED | {"completed"}
EDGE = re.compile(r"[_\-. :](?:start(?:ed)?|begin|end(?:ed)?|stop(?:ped)?|completed?|finish(?:ed)?|done|fail(?:ed)?)\Z")
EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)
MICROSECOND = timedelta(microseconds=1)
LATEST = 1 << 63


def timestamp(ns: int) -> str:
    """Unix ns as ISO 8601 in UTC, to the microsecond; texts sort as times do."""
    return (EPOCH + ns // 1000 * MICROSECOND).isoformat(timespec="microseconds")


def instant(value: Any) -> int | None:
    """A timestamp as Unix ns: ISO 8601 (local time where it names no zone), or Unix seconds. None for none.

    Raises ValueError for what is no time, or one that Unix ns cannot tell.
    """
    if value is None:
        return None
    if isinstance(value, str):
        try:
            told = datetime.fromisoformat(f"{value[:-1]}+00:00" if value.endswith(("Z", "z")) else value)
            ns = (told.astimezone(timezone.utc) - EPOCH) // MICROSECOND * 1000
        except (ValueError, OverflowError, OSError) as error:
            raise ValueError(f"timestamp {value!r:.80} is no time: {error}") from None
    else:
        found = nanoseconds(value)
        ns = -1 if found is None else found
    if not 0 <= ns < LATEST:
        raise ValueError(f"timestamp {value!r:.80} is no time")
    return ns


def measured(value: Any) -> bool | int | float | str | None:
    """A number as JSON can hold it; None for what is none. Takes what has `__float__`: numpy's scalars, 0-d tensors."""
    if isinstance(value, bool):
        return value
    if type(value) is int and -LATEST <= value < LATEST:
        return value
    if isinstance(value, (str, bytes)) or value is None:
        return None
    try:
        return json_number(float(value))
    except Exception:  # a user's __float__ may raise anything
        return None


def unfolded(metrics: Mapping[Any, Any]) -> dict[Any, Any]:
    """Metrics, of which `{"metric": name, "value": number}` is one."""
    found = dict(metrics)
    if "value" in found and isinstance(found.get("metric"), str):
        name = found.pop("metric")
        found[name] = found.pop("value")
    return found


def numbers(record: Mapping[str, Any]) -> dict[str, float | str]:
    """The points of a record: metric -> number as a journal's event holds it."""
    values = {key: number(value) for key, value in unfolded(record.get("metrics") or {}).items()}
    return {key: value for key, value in values.items() if value is not None}


def milestone(record: Mapping[str, Any]) -> tuple[str, str | None, dict[str, Any]] | None:
    """What a record tells beside its numbers: name, status, attributes. None where it tells nothing.

    The name is that of the event, or else the command's. Texts among the metrics are attributes.
    """
    texts = {key: value for key, value in unfolded(record.get("metrics") or {}).items() if number(value) is None}
    about = {**texts, **(record.get("attributes") or {})}
    if record.get("message") is not None:
        about["message"] = record["message"]
    event, status, command = record.get("event"), record.get("status"), record.get("command")
    if event is None and status is None and not about:
        return None
    if command is not None:
        about["command"] = command
    name = next((str(name) for name in (event, command) if name), "telemetry")
    return name, None if status is None else str(status), json_value(about)


def span_name(record: Mapping[str, Any]) -> str:
    """What begins and ends: "model_load" of "model_load_start" and "model_load_end", or else the command."""
    event = record.get("event")
    return (EDGE.sub("", str(event)) or str(event)) if event else str(record.get("command") or "telemetry")


def edge(record: Mapping[str, Any]) -> str | None:
    """Whether a record's status is that of a "begin" or of an "end"."""
    status = str(record.get("status")).lower()
    return "begin" if status in STARTED else "end" if status in ENDED else None


def has_failed(record: Mapping[str, Any]) -> bool:
    """Whether a record says so."""
    return str(record.get("status")).lower() in FAILED
