"""An event as one line for a person: a row for each tag."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import islice
from typing import Any

from stepspan.events import Event
from stepspan.mapping.clock import clock_text
from stepspan.mapping.names import split_in_key
from stepspan.values import format_seconds, shorten

EventText = Callable[[Event, "Event | None"], str]
COMMON_FIELDS = frozenset({"ts", "seq", "tag", "crc", "parent", "begin"})
MAX_FIELDS = 100
MAX_VALUE_CHARS = 200
SUCCEEDED = frozenset({None, "ok", "completed"})


def event_text(event: Event, begin: Event | None = None) -> str:
    """What happened, in one line.

    Args:
        event: An event of a journal. One with an unknown tag, or without the fields of its tag, is shown as it is.
        begin: The begin event of an end event, where it is known: it has the name, and when it began.

    """
    row = ROWS.get(event["tag"])
    try:
        if row is not None:
            return row(event, begin)
    except (KeyError, TypeError, ValueError, AttributeError):  # fields that are not what the schema says
        pass
    return f"{event['tag']} {format_fields({k: v for k, v in event.items() if k not in COMMON_FIELDS})}".rstrip()


def format_fields(fields: Mapping[str, Any]) -> str:
    """`key=value key=value`."""
    more = len(fields) - MAX_FIELDS
    shown = [f"{key}={format_value(value)}" for key, value in islice(fields.items(), MAX_FIELDS)]
    return " ".join([*shown, f"… {more:,} more"] if more > 0 else shown)


def format_value(value: Any) -> str:
    """A value in a few characters: six digits of a float, quotes around a text with spaces or without characters."""
    if isinstance(value, float):
        return f"{value:.6g}"
    text = shorten(str(value), MAX_VALUE_CHARS)
    return repr(text) if isinstance(value, str) and (" " in text or not text) else text


def printable(text: str) -> str:
    """A text with a space for each character that would move a cursor, ring or colour: a journal holds any text."""
    return text if text.isprintable() else "".join(c if c.isprintable() else " " for c in text)


def _title(kind: str, begin: Event | None) -> str:
    """What a scope is called, by its begin event."""
    if begin is None:
        return kind
    if kind == "step":
        split = "" if begin.get("split", "train") == "train" else f"{begin['split']} "
        return f"{split}step {begin['step']}"
    return str(begin["name"]) if kind == "span" else f"{kind} {begin.get('epoch', begin.get('name') or '')}".rstrip()


def _duration(event: Event, begin: Event | None) -> str:
    if begin is None:
        return "ended"
    return f"took {format_seconds((event.get('ended', event['ts']) - begin['ts']) / 1e9)}"


def _scope_begin(event: Event, _: Event | None) -> str:
    return f"{_title(event['tag'].removesuffix('_begin'), event)} begins"


def _scope_end(event: Event, begin: Event | None) -> str:
    status = "" if event.get("status") in SUCCEEDED else f", {event['status']}"
    return f"{_title(event['tag'].removesuffix('_end'), begin)} {_duration(event, begin)}{_step_details(event)}{status}"


def _step_details(event: Event) -> str:
    wait = f", waited {format_seconds(event['data_wait'])} for data" if event.get("data_wait") else ""
    return wait + "".join(f", {event[item]} {item}" for item in ("samples", "tokens") if item in event)


def _device_time(event: Event, begin: Event | None) -> str:
    duration = "not known" if event["seconds"] is None else format_seconds(event["seconds"])
    return f"{_title('a span', begin)} on the device: {duration}"


def _metrics(event: Event, _: Event | None) -> str:
    split = event.get("split", "train")
    values = {key: "…" if value is None else value for key, value in event["metrics"].items()}  # computed later
    named_by_keys = all(split_in_key(key)[0] for key in values)
    prefix = "" if split == "train" or named_by_keys else f"{split}  "
    return f"{prefix}{format_fields(values)} {format_fields(event.get('attributes', {}))}".rstrip()


def _event(event: Event, _: Event | None) -> str:
    status = f" [{event['status']}]" if event.get("status") else ""
    return f"{event['name']}{status} {format_fields(event.get('attributes') or {})}".rstrip()


def _sample(event: Event, _: Event | None) -> str:
    values = {}
    for name, value, *attributes in event["values"]:
        labels = ",".join(str(label) for labels in attributes for label in labels.values())
        values[f"{name}{{{labels}}}" if labels else name] = value
    return f"{event['source']}: {format_fields(values)}"


ROWS: Mapping[str, EventText] = {
    "header": lambda e, _: f"session {e['session']} on {e['host']}, pid {e['pid']}",
    **dict.fromkeys(("run_begin", "epoch_begin", "step_begin", "span_begin"), _scope_begin),
    **dict.fromkeys(("epoch_end", "step_end", "span_end"), _scope_end),
    "run_end": lambda e, begin: f"{_title('run', begin)} {_duration(e, begin)}: {e['status']}",
    "device_time": _device_time,
    "metrics": _metrics,
    "hyperparams": lambda e, _: f"hyperparameters {format_fields(e['params'])}",
    "artifact": lambda e, _: f"{e['kind']} {e['name']}: {e['path']}",
    "event": _event,
    "error": lambda e, _: f"{e['type']}: {e['message']}",
    "log": lambda e, _: f"{e['severity'].upper()} {e['logger']}: {e['message']}",
    "dropped": lambda e, _: f"{e['count']} of {e['key']} not recorded: {e['why']}",
    "progress": lambda e, _: f"{e['total_steps']} steps in all",
    "sample": _sample,
    "memory": lambda e, _: f"device {e['device_id']}: {format_fields(e['counters'])}",
    "otel": lambda e, _: f"OpenTelemetry {e['signal']}: {e['record'].get('name') or e['record'].get('body', '')}",
    "gap": lambda e, _: f"{e['dropped']} events before this one could not be written: {e['why']}",
    "clock": lambda e, _: clock_text(e),
}
